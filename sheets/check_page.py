"""What check_data.py found, as one page for a browser: no script, nothing loaded, every word of the sheet as text."""

import base64
import io
from collections.abc import Sequence
from html import escape
from itertools import islice

from sheets.checks import count_kinds
from sheets.photos import PhotoError, open_photo
from sheets.samples import RowProblem, Sample

_SHOWN_ROWS, _SHOWN_PHOTOS, _SHOWN_TEXT = 100, 5, 300  # rows of a kind, photos of a row, characters of a text
_THUMBNAIL = 96  # pixels
_STYLE = """
body { font: 15px/1.45 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; color: #1f2933;
       margin: 0 auto; max-width: 1200px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 8px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 32px 0 8px; }
.conclusion { padding: 12px 16px; border-radius: 6px; background: #e3f9e5; overflow-wrap: anywhere; }
.conclusion.not { background: #ffe3e3; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { text-align: left; vertical-align: top; padding: 8px; border-bottom: 1px solid #e4e7eb;
         overflow-wrap: anywhere; white-space: pre-line; }
th { background: #f5f7fa; } .number { width: 70px; } .id { width: 120px; } .label { width: 150px; }
.photos { width: 220px; white-space: normal; } .counts { width: auto; table-layout: auto; }
img { max-width: 96px; max-height: 96px; margin: 0 4px 4px 0; border: 1px solid #e4e7eb; }
.out { color: #a61b1b; } .used { color: #52606d; }
@media (max-width: 800px) {
  body { padding: 12px; } .rows th { display: none; }
  table.rows, .rows tbody, .rows tr, .rows td { display: block; width: auto; }
  .rows tr { border-bottom: 2px solid #c5ccd3; padding: 8px 0; } .rows td { border: 0; padding: 2px 0; }
  .rows td:empty { display: none; } .rows td::before { content: attr(data-name) "  "; color: #52606d; font-size: 13px; }
}
"""


def html_page(path: str, rows: Sequence[Sample], problems: Sequence[RowProblem], conclusion: str) -> str:
    """Write the page: the conclusion, the kinds of problem, and the first rows of each with their photos."""
    counts = count_kinds(problems)
    samples = {sample.row: sample for sample in rows}
    index = "".join(f'<tr><td><a href="#{place}">{escape(kind)}</a></td><td>{count}</td></tr>'
                    for place, (kind, count) in enumerate(counts.items()))
    sections = [_section(place, kind, [problem for problem in problems if problem.kind == kind], samples)
                for place, kind in enumerate(counts)]
    would_not = " not" if "would not start" in conclusion else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(path)}: data check</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(path)}</h1>
<p>{len(rows)} rows with a text, {sum(bool(sample.label) for sample in rows)} with a readable label.</p>
<p class="conclusion{would_not}">{escape(conclusion)}</p>
<table class="counts"><tr><th>kind</th><th>rows</th></tr>{index}</table>
{"".join(sections)}
</body>
</html>
"""


def _section(place: int, kind: str, problems: Sequence[RowProblem], samples: dict[int, Sample]) -> str:
    of_row: dict[int, list[RowProblem]] = {}
    for problem in problems:
        of_row.setdefault(problem.row, []).append(problem)
    lines = "".join(_line(together, samples.get(row)) for row, together in islice(of_row.items(), _SHOWN_ROWS))
    more = f"<p>... and {len(of_row) - _SHOWN_ROWS} more rows; the sheet that was written back names all.</p>"
    return f"""<h2 id="{place}">{escape(kind)}</h2>
<table class="rows"><tr><th class="number">row</th><th class="id">product</th><th>text</th><th class="label">label</th>
<th class="label">read</th><th>problem</th><th class="photos">photos</th></tr>
{lines}</table>
{more if len(of_row) > _SHOWN_ROWS else ""}"""


def _line(problems: Sequence[RowProblem], sample: Sample | None) -> str:
    """Lay out one row of the sheet with its problems of one kind."""
    text, label, read, photos = ((sample.text, sample.written_label, str(sample.label or ""), sample.photos) if sample
                                 else ("", "", "", ()))
    shown = text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + " ..."
    used = all(problem.used for problem in problems)
    use = '<span class="used">used</span>' if used else '<span class="out">left out</span>'
    cells = {"row": f"{problems[0].row}\n{use}", "product": escape(problems[0].product_id), "text": escape(shown),
             "label": escape(label), "read": escape(read),
             "problem": escape("\n".join(problem.detail for problem in problems)),
             "photos": "".join(_thumbnail(photo) for photo in photos[:_SHOWN_PHOTOS])}
    return "<tr>" + "".join(f'<td data-name="{name}"{" class=" + name if name == "photos" else ""}>{cell}</td>'
                            for name, cell in cells.items()) + "</tr>\n"


def _thumbnail(path: str) -> str:
    try:
        photo = open_photo(path)
    except PhotoError:
        return f'<span class="out">{escape(path.rpartition("/")[2])}: broken</span>'
    photo.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'

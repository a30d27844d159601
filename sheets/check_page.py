"""What check_data.py found, as one page for a browser: no script, nothing loaded, every word of the sheet as text."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from sheets.findings import FoundRow, Kind
from sheets.photos import SeenPhoto
from sheets.samples import RowProblem

_SHOWN_PHOTOS, _SHOWN_TEXT = 5, 300  # photos of a row, characters of a text
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


def html_page(path: str, summary: str, kinds: Mapping[str, Kind], conclusion: str, seen: Mapping[str, SeenPhoto]
              ) -> str:
    """Write the page: what the sheet holds, the conclusion, the kinds of problem, the first rows of each with photos.

    seen: path -> what was seen of a photo, where it was opened.
    """
    index = "".join(f'<tr><td><a href="#{place}">{escape(name)}</a></td><td>{kind.rows}</td></tr>'
                    for place, (name, kind) in enumerate(kinds.items()))
    sections = [_section(place, name, kind, seen) for place, (name, kind) in enumerate(kinds.items())]
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
<p>{escape(summary)}.</p>
<p class="conclusion{would_not}">{escape(conclusion)}</p>
<table class="counts"><tr><th>kind</th><th>rows</th></tr>{index}</table>
{"".join(sections)}
</body>
</html>
"""


def _section(place: int, name: str, kind: Kind, seen: Mapping[str, SeenPhoto]) -> str:
    lines = "".join(_line(row, problems, seen) for row, problems in kind.first)
    more = f"<p>... and {kind.rows - len(kind.first)} more rows; the sheet that was written back names all.</p>"
    return f"""<h2 id="{place}">{escape(name)}</h2>
<table class="rows"><tr><th class="number">row</th><th class="id">product</th><th>text</th><th class="label">label</th>
<th class="label">read</th><th>problem</th><th class="photos">photos</th></tr>
{lines}</table>
{more if kind.rows > len(kind.first) else ""}"""


def _line(row: FoundRow, problems: Sequence[RowProblem], seen: Mapping[str, SeenPhoto]) -> str:
    """Lay out one row of the sheet with its problems of one kind."""
    shown = row.text if len(row.text) <= _SHOWN_TEXT else row.text[:_SHOWN_TEXT] + " ..."
    used = all(problem.used for problem in problems)
    use = '<span class="used">used</span>' if used else '<span class="out">left out</span>'
    cells = {"row": f"{row.number}\n{use}", "product": escape(row.product_id), "text": escape(shown),
             "label": escape(row.label), "read": escape(row.read),
             "problem": escape("\n".join(problem.detail for problem in problems)),
             "photos": "".join(_thumbnail(photo, seen.get(photo)) for photo in row.photos[:_SHOWN_PHOTOS])}
    return "<tr>" + "".join(f'<td data-name="{name}"{" class=" + name if name == "photos" else ""}>{cell}</td>'
                            for name, cell in cells.items()) + "</tr>\n"


def _thumbnail(path: str, seen: SeenPhoto | None) -> str:
    if seen and seen.thumbnail:
        return f'<img src="data:image/jpeg;base64,{base64.b64encode(seen.thumbnail).decode()}" alt="">'
    name = escape(path.rpartition("/")[2])
    return f'<span class="out">{name}: broken</span>' if seen else f'<span class="used">{name}: not opened</span>'

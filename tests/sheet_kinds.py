"""Sheets of every kind, written as their programs write them."""

import json
import zipfile

import xlwt

from sheets.table import write_table


def write_ods(path, rows):
    """Write a spreadsheet of the OpenDocument kind by hand: every cell text."""
    body = "".join("<table:table-row>" + "".join(
        f'<table:table-cell office:value-type="string"><text:p>{cell}</text:p></table:table-cell>' for cell in row)
        + "</table:table-row>" for row in rows)
    spaces = " ".join(f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
                      for name in ("office", "table", "text"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr("META-INF/manifest.xml", '<manifest xmlns="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"'
                                                  '/>')
        archive.writestr("content.xml", f'<office:document-content {spaces}><office:body><office:spreadsheet>'
                                        f'<table:table table:name="products">{body}</table:table>'
                                        '</office:spreadsheet></office:body></office:document-content>')


def write_xls(path, rows):
    """Write a workbook of the old kind."""
    book = xlwt.Workbook()
    sheet = book.add_sheet("products")
    for place, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.write(place, column, cell)
    book.save(str(path))


def write_objects(path, rows):
    """Write a JSON list of objects."""
    path.write_text(json.dumps([dict(zip(rows[0], row, strict=True)) for row in rows[1:]]), encoding="utf-8")


def write_lines(path, rows):
    """Write a JSON object a line."""
    path.write_text("\n".join(json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]), encoding="utf-8")


WRITERS = {".xlsx": write_table, ".xlsm": lambda path, rows: write_table(path.with_suffix(".xlsx"), rows)
           or path.with_suffix(".xlsx").rename(path), ".ods": write_ods, ".xls": write_xls, ".json": write_objects,
           ".jsonl": write_lines,
           ".tsv": lambda path, rows: path.write_text("\n".join("\t".join(row) for row in rows), encoding="utf-8")}

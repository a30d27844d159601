"""Pictures that are the value of a cell in Excel -> the part or the address of each, by the cell's vm attribute.

vm counts, from 1, the blocks of value metadata; these name a rich value, whose structure says which of its values is
the number of a picture in the workbook or of one from the web (MS-XLSX 2.2.4.13, 2.3.6, 2.6.160).
"""

from xml.etree.ElementTree import Element

from sheets.package import Package, attribute, name

_FOLDER = "/xl/richData/"


def picture_values(package: Package) -> dict[str, str]:
    """Return for each vm that stands for a picture the part that holds it, its address, or "" where it has neither."""
    metadata = package.tree("/xl/metadata.xml")
    kinds = [kind.get("name") for kind in _all(metadata, "metadataType")]
    future = next((block for block in _all(metadata, "futureMetadata") if block.get("name") == "XLRICHVALUE"), [])
    numbers = [next((int(entry.get("i", 0)) for entry in block.iter() if name(entry) == "rvb"), -1) for block in future]
    structures = [(structure.get("t"), [key.get("n", "") for key in structure])
                  for structure in _all(package.tree(_FOLDER + "rdrichvaluestructure.xml"), "s")]
    values = [(int(value.get("s", 0)), [entry.text or "" for entry in value if name(entry) == "v"])
              for value in _all(package.tree(_FOLDER + "rdrichvalue.xml"), "rv")]
    local, web = _local_pictures(package), _web_pictures(package)
    found = {}
    for vm, block in enumerate(next(iter(_all(metadata, "valueMetadata")), []), 1):
        for record in block:
            if kinds[int(record.get("t", 1)) - 1] != "XLRICHVALUE":
                continue
            structure, entries = values[numbers[int(record.get("v", 0))]]
            for key, entry in zip(structures[structure][1], entries, strict=False):
                if key.endswith("LocalImageIdentifier"):
                    found[str(vm)] = local[int(entry)] if int(entry) < len(local) else ""
                elif key.endswith("WebImageIdentifier"):
                    found[str(vm)] = web[int(entry)] if int(entry) < len(web) else ""
    return found


def _all(tree: Element, wanted: str) -> list[Element]:
    return [element for element in tree.iter() if name(element) == wanted]


def _local_pictures(package: Package) -> list[str]:
    part = _FOLDER + "richValueRel.xml"
    targets = package.targets(part)
    return [targets.get(attribute(entry, "id"), "") for entry in _all(package.tree(part), "rel")]


def _web_pictures(package: Package) -> list[str]:
    """Take the copy that Excel keeps, or else the address."""
    part = _FOLDER + "rdRichValueWebImage.xml"
    targets = package.targets(part)
    found = []
    for picture in _all(package.tree(part), "webImageSrd"):
        ids = {name(entry): attribute(entry, "id") for entry in picture}
        found.append(next((targets[ids[kind]] for kind in ("blip", "address") if ids.get(kind) in targets), ""))
    return found

"""Stands for the process that reads a sheet: a line of a .csv is a product, and a journal says which are done."""

import json
import sys
from pathlib import Path

settings = json.loads(sys.stdin.readline())["answer"]
lines = Path(settings["data_path"]).read_text().split()
journal = Path(settings["output_path"] + ".journal")
with journal.open("a") as file:
    if not file.tell():
        file.write("made with\n")
done = len(journal.read_text().splitlines()) - 1
print(json.dumps({"products": len(lines)}), flush=True)
for start in range(done, len(lines), 4):
    asked = [{"text": text, "photos": [], "samples": settings["num_samples"], "greedy": False,
              "missing_photos": "use_rest"} for text in lines[start:start + 4]]
    print(json.dumps({"ask": asked}), flush=True)
    answers = json.loads(sys.stdin.readline())["lines"]
    with journal.open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in answers)
journal.rename(settings["output_path"])
print(json.dumps({"written": True}), flush=True)

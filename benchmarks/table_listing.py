"""Rows per CPU second and peak memory of listing large tables, and the memory that a plan needs per row.

    OMP_NUM_THREADS=1 python benchmarks/table_listing.py --work /tmp/tables --rows 10000000 --json result.json

Writes one table of image captions per format, and lists each in a new process: once as the reader does,
where memory must not grow with the table, and once into a plan, whose items are all in memory.
"""

import argparse
import csv
import gzip
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from muomni.errors import exit_on_error

# Name of the table: task and format of its reader.
_TABLES = {
    "rows.csv": ("image-caption", "csv"),
    "rows.tsv": ("image-caption", "tsv"),
    "rows.jsonl": ("image-caption", "jsonl"),
    "rows.jsonl.gz": ("image-caption", "jsonl"),
    "list.json": ("image-caption", "jsonl"),
    "rows.parquet": ("image-caption", "parquet"),
    "texts.parquet": ("text", "parquet"),
    "lines.txt": ("text", "txt"),
    "lines.txt.gz": ("text", "txt"),
}
_ROWS_PER_GROUP = 100_000
_LIMIT_MB = 1000


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--work", type=Path, required=True, help="folder for the tables")
    flags.add_argument("--rows", type=int, default=10**7)
    flags.add_argument("--plan-rows", type=int, default=200_000, help="rows of the measured plans")
    flags.add_argument("--only", nargs="+", choices=_TABLES, default=list(_TABLES))
    flags.add_argument("--list", help="list this table in this process")
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with exit_on_error("table_listing"):
        if arguments.list:
            print(json.dumps(_listed(arguments.work / arguments.list, arguments.plan_rows)))
            return
        arguments.work.mkdir(parents=True, exist_ok=True)
        results = {}
        print(f"{'table':16}{'rows/CPU s':>12}{'peak MB':>10}{'plan, bytes/row':>18}")
        for name in arguments.only:
            _write(arguments.work / name, arguments.rows)
            row = _in_new_process(arguments.work, name, 0)
            plan = _in_new_process(arguments.work, name, arguments.plan_rows)
            row["plan_bytes_per_row"] = plan["plan_bytes_per_row"]
            results[name] = row
            (arguments.work / name).unlink()
            values = (row["rows_per_cpu_s"], row["peak_mb"], row["plan_bytes_per_row"])
            print(f"{name:16}{values[0]:>12,.0f}{values[1]:>10,.0f}{values[2]:>18,.0f}", flush=True)
        if arguments.json:
            content = {"rows": arguments.rows, "tables": results, "machine": machine_facts()}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        too_large = [name for name, row in results.items() if row["peak_mb"] > _LIMIT_MB]
        if too_large:
            raise SystemExit(f"more than {_LIMIT_MB} MB: {', '.join(too_large)}")


def _caption(number: int) -> str:
    return f'A "photo" of thing {number}, on a table beside a window in the afternoon.'


def _lines(name: str, num_rows: int) -> Iterator[str]:
    if name.startswith("lines"):
        yield from (f"{_caption(number)}\n" for number in range(num_rows))
        return
    if name.endswith((".csv", ".tsv")):
        yield "\t".join(("image", "caption\n")) if name.endswith(".tsv") else "image,caption\n"
    buffer = io.StringIO()
    write_csv = csv.writer(buffer, lineterminator="\n").writerow
    for number in range(num_rows):
        image = f"images/{number // 1000:05d}/{number:09d}.jpg"
        if name.endswith(".tsv"):
            yield f"{image}\t{_caption(number)}\n"
        elif name.endswith(".csv"):
            write_csv((image, _caption(number)))
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
        else:
            line = json.dumps({"image": image, "caption": _caption(number)})
            is_last = number == num_rows - 1
            mark = ("[" if number == 0 else "", "]" if is_last else ",")
            yield f"{mark[0]}{line}{mark[1]}" if name == "list.json" else f"{line}\n"


def _write(path: Path, num_rows: int) -> None:
    if path.suffix == ".parquet":
        _write_parquet(path, num_rows)
        return
    is_packed = path.suffix == ".gz"
    with gzip.open(path, "wt", compresslevel=1) if is_packed else path.open("w") as file:
        file.writelines(_lines(path.name, num_rows))


def _write_parquet(path: Path, num_rows: int) -> None:
    import pyarrow
    import pyarrow.parquet

    is_text = path.name.startswith("texts")
    names = ["text"] if is_text else ["image", "caption"]
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, _ROWS_PER_GROUP):
            numbers = range(start, min(num_rows, start + _ROWS_PER_GROUP))
            columns = [list(map(_caption, numbers))]
            if not is_text:
                columns.insert(0, [f"images/{n // 1000:05d}/{n:09d}.jpg" for n in numbers])
            writer.write_table(pyarrow.table(columns, schema=schema))


def _in_new_process(work: Path, name: str, plan_rows: int) -> dict[str, float]:
    """List a table in its own process, for its peak memory."""
    command = [sys.executable, __file__, "--work", str(work), "--list", name]
    command += ["--plan-rows", str(plan_rows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def _listed(path: Path, plan_rows: int) -> dict[str, float]:
    """List all rows and drop them, or keep the first `plan_rows` as a plan does."""
    from data_prep.options import ReaderOptions
    from data_prep.readers import find_reader

    items = find_reader(*_TABLES[path.name])(path, ReaderOptions())
    if plan_rows:
        # Buffers of the readers are allocated by then.
        kept = [next(items)]
        before = _resident_bytes()
        kept += [item for _, item in zip(range(plan_rows), items, strict=False)]
        return {"plan_bytes_per_row": (_resident_bytes() - before) / len(kept)}
    start = time.process_time()
    num_rows = sum(1 for _ in items)
    return {
        "rows": num_rows,
        "rows_per_cpu_s": num_rows / (time.process_time() - start),
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    """Peak memory of this program; that of `getrusage` includes the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()

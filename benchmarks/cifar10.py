"""The paper's CIFAR-10 table, measured: writes cifar10.json and cifar10.md.

    modiff statistics --features $FEATURES --data.path $DATA --data.channels 3 --output $REFERENCE
    python benchmarks/cifar10.py --features $FEATURES --reference $REFERENCE

It takes the rows in the order of benchmarks/cifar10_table.py, and goes on where the last session stopped: rows that
stand measured in cifar10.json are kept, an interrupted row goes on at its next batch. Both teachers are those that
`modiff train` leaves in runs/cifar10; rows of a teacher that is not there stay open. A session of half an hour:
--minutes 30. Without --features the rows have a PSNR and no Fréchet distance.

By default the files beside this script are rewritten; trials (--num_images, --steps, --batch_size) go to
another folder, by default that of the runs.
--list writes the two files without measuring anything.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cifar10_report import markdown  # noqa: E402
from cifar10_table import BATCH, IMAGES, Row, all_rows  # noqa: E402

HERE = Path(__file__).parent
TEACHERS = {"small": "runs/cifar10/teacher_small/export", "large": "runs/cifar10/teacher/export"}
METRICS = ("fid", "fid_to_teacher", "psnr_db", "relative_l2")
SLOWEST = 2.0
"""Allowed time of a simulated student's evaluation, in units of the teacher's."""


def main(argv: list[str] | None = None) -> int:
    """Run what is open, as far as the limits allow; write both files after every row."""
    args = make_parser().parse_args(argv)
    trial = any(value is not None for value in (args.num_images, args.batch_size, args.steps))
    folder = args.results or (args.output if trial else HERE)
    rows = [row for row in all_rows() if args.only in (None, row.teacher)]
    results = Results(folder, args)
    if not args.list:
        measure(rows, results, args)
    results.write()
    print(f"{results.count} of {len(results.rows)} rows measured: {folder / 'cifar10.json'}, {folder / 'cifar10.md'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", help="Feature network, such as cifar10_resnet56.pt.")
    parser.add_argument("--reference", help="Its statistics of the training images.")
    parser.add_argument("--only", choices=list(TEACHERS), help="One teacher only.")
    parser.add_argument("--match", help="Only rows with this in their id, such as steps100/seed0/w8a4.")
    parser.add_argument("--teacher_small", default=TEACHERS["small"], help="Pipeline folder of the small teacher.")
    parser.add_argument("--teacher_large", default=TEACHERS["large"], help="Pipeline folder of the large teacher.")
    parser.add_argument("--limit", type=int, help="Measure at most so many rows.")
    parser.add_argument("--minutes", type=float, help="Start no row after so many minutes.")
    parser.add_argument("--num_images", type=int, help="A trial with so many images.")
    parser.add_argument("--batch_size", type=int, help=f"A trial with another batch size than {BATCH}.")
    parser.add_argument("--steps", type=int, help="A trial with so many steps in every row.")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="bf16-mixed", help="Of teacher and student; Lightning's words.")
    parser.add_argument("--timing_rounds", type=int, default=3, help="Of the time ratio, measured in seed 0 only.")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10_benchmark"), help="Runs of the rows.")
    parser.add_argument("--results", type=Path, help="Folder of cifar10.json and cifar10.md.")
    parser.add_argument("--list", action="store_true", help="Measure nothing, write both files.")
    return parser


def measure(rows: list[Row], results: Results, args: argparse.Namespace) -> None:
    """Evaluate open rows in order."""
    start, done = time.monotonic(), 0
    for row in rows:
        if not Path(teacher_path(row, args)).is_dir() or (args.match and args.match not in row.id):
            continue
        if results.has(row):
            continue
        late = args.minutes is not None and time.monotonic() - start > 60 * args.minutes
        if late or (args.limit is not None and done >= args.limit):
            break
        metrics = evaluate(row, args, results.fingerprint(row))
        results.add(row, metrics)
        results.write()
        done += 1
        print(line(row, metrics), flush=True)


def evaluate(row: Row, args: argparse.Namespace, fingerprint: str) -> dict[str, Any]:
    """One row by modiff's own evaluation; rows with the same noise and steps share the teacher's images."""
    from modiff.lit.commands.evaluate import StudentCLI, evaluate_recipe

    options = row_options(row, args)
    root = args.output / fingerprint / f"{row.teacher}_{num_images(row, args)}_{batch_size(args)}_{args.precision}"
    shared = root / f"steps{steps(row, args)}" / f"seed{row.seed}"
    if row.seed != 0:
        options += ["--timing_rounds", "0"]
    else:
        options += ["--timing_rounds", str(args.timing_rounds)]
    options += ["--error_images", "0", "--wandb", "disabled", "--trainer.enable_progress_bar", "false"]
    accelerator = {"cuda": "gpu"}.get(args.device, args.device)
    options += ["--trainer.accelerator", accelerator, "--trainer.devices", "1"]
    cli = StudentCLI("evaluate", [*options, "--output", str(shared / row.name)])
    return evaluate_recipe(cli, shared / "teacher").as_json()


def row_options(row: Row, args: argparse.Namespace, placeholders: bool = False) -> list[str]:
    """Options of ``modiff evaluate`` that the row's figures depend on."""
    options = ["--config", row.recipe if placeholders else str(HERE.parent / row.recipe), *row.options()]
    if args.steps is not None:
        options[options.index("--model.steps") + 1] = str(args.steps)
    teacher = teacher_path(row, args)
    if teacher != TEACHERS["small"]:
        known = teacher == TEACHERS[row.teacher]
        options += ["--model.teacher.path", teacher if known or not placeholders else "$TEACHER"]
    for name in ("features", "reference"):
        if getattr(args, name) is not None or (placeholders and args.list):
            options += [f"--model.{name}", f"${name.upper()}" if placeholders else getattr(args, name)]
    options += ["--num_images", str(num_images(row, args)), "--data.batch_size", str(batch_size(args))]
    return [*options, "--trainer.precision", args.precision]


def command(row: Row, args: argparse.Namespace) -> str:
    """The row's command for the JSON, without this machine's paths."""
    parts = ["modiff", "evaluate", *row_options(row, args, placeholders=True)]
    return " ".join(part if part.startswith("$") else shlex.quote(part) for part in parts)


def teacher_path(row: Row, args: argparse.Namespace) -> str:
    """Folder of the row's teacher."""
    return str(args.teacher_small if row.teacher == "small" else args.teacher_large)


def num_images(row: Row, args: argparse.Namespace) -> int:
    """Images of the row."""
    return IMAGES[row.teacher] if args.num_images is None else int(args.num_images)


def batch_size(args: argparse.Namespace) -> int:
    """Images per batch."""
    return BATCH if args.batch_size is None else int(args.batch_size)


def steps(row: Row, args: argparse.Namespace) -> int:
    """Sampler steps of the row."""
    return row.steps if args.steps is None else int(args.steps)


def line(row: Row, metrics: dict[str, Any]) -> str:
    """What is printed of a row; a student that is slower than allowed is said so."""
    shown = {key: metrics["student"].get(key) for key in METRICS}
    text = f"{row.id}: " + ", ".join(f"{k} {'-' if v is None else f'{v:.4g}'}" for k, v in shown.items())
    ratio = metrics.get("time_ratio")
    if ratio is not None:
        text += f"; time {ratio:.2f}x of the teacher's" + (f" (more than {SLOWEST:g}x)" if ratio > SLOWEST else "")
    return text


class Results:
    """The content of ``cifar10.json``: every row, measured or open.

    Args:
        folder: Where both files are.
        args: The options.

    Raises:
        SystemExit: The files there are of another teacher, precision or number of images.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.rows = {row.id: self.empty(row) for row in all_rows()}
        self.fingerprints: dict[str, str] = {}
        path = folder / "cifar10.json"
        for old in json.loads(path.read_text())["rows"] if path.is_file() else []:
            if old["measured"]:
                self._keep(old)

    def empty(self, row: Row) -> dict[str, Any]:
        """An open row."""
        return {
            **row.facts(),
            "steps": steps(row, self.args),
            "paper_fid": row.paper_fid if self.args.steps is None else None,
            "num_images": num_images(row, self.args),
            "measured": False,
            "machine": None,
            "command": command(row, self.args),
        }

    def _keep(self, old: dict[str, Any]) -> None:
        new = self.rows.get(old["id"])
        if new is None:
            return
        facts = {k: v for k, v in new.items() if k not in ("measured", "machine", "command")}
        if not self.args.list:
            facts["precision"] = self.args.precision
        for key, value in facts.items():
            if old[key] != value:
                raise SystemExit(
                    f"{self.folder / 'cifar10.json'} holds {old['id']} with {key} {old[key]!r}, now it is {value!r}: "
                    "give another --results folder, or the same options."
                )
        self.rows[old["id"]] = old

    @property
    def count(self) -> int:
        """Rows that are measured."""
        return sum(row["measured"] for row in self.rows.values())

    def fingerprint(self, row: Row) -> str:
        """Content hash of the row's teacher.

        Raises:
            SystemExit: Rows in the file are of another one.
        """
        from modiff.teachers.zoo import TeacherSpec, load_teacher

        if row.teacher not in self.fingerprints:
            mine = load_teacher(TeacherSpec(path=teacher_path(row, self.args))).fingerprint
            others = {
                r["teacher_fingerprint"] for r in self.rows.values() if r["measured"] and r["teacher"] == row.teacher
            }
            if others - {mine}:
                raise SystemExit(
                    f"{self.folder / 'cifar10.json'} holds rows of another {row.teacher} teacher ({others.pop()}, this "
                    f"one is {mine}): give another --results folder."
                )
            self.fingerprints[row.teacher] = mine
        return self.fingerprints[row.teacher]

    def has(self, row: Row) -> bool:
        """Whether the row is measured already, of this teacher."""
        self.fingerprint(row)
        return bool(self.rows[row.id]["measured"])

    def add(self, row: Row, metrics: dict[str, Any]) -> None:
        """Take a measured row."""
        provenance = metrics["provenance"]
        self.rows[row.id] = {
            **self.empty(row),
            "measured": True,
            **{key: metrics["student"].get(key) for key in METRICS},
            "teacher_fid": metrics["teacher"].get("fid"),
            "features": metrics["features"]["network"],
            "evaluations": metrics["evaluations"],
            "time_ratio": metrics.get("time_ratio"),
            "gbops_per_evaluation": metrics["cost"]["gbops_per_evaluation"],
            "seconds": round(metrics["seconds"], 2),
            "precision": self.args.precision,
            "teacher_fingerprint": self.fingerprint(row),
            "machine": {key: provenance[key] for key in ("device", "torch") if key in provenance},
        }

    def write(self) -> None:
        """Write both files; one line for each row."""
        from modiff.storage.atomic import write_text

        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in self.rows.values())
        note = (
            "fid and teacher_fid are Fréchet distances in the named feature network, not FID; paper_fid is FID as "
            "published. Rows with measured: false hold no figure of ours."
        )
        text = f'{{\n "note": {json.dumps(note, ensure_ascii=False)},\n "rows": [\n{rows}\n ]\n}}\n'
        report = markdown(list(self.rows.values()))
        for name, content in (("cifar10.json", text), ("cifar10.md", report)):
            write_text(self.folder / name, content)


if __name__ == "__main__":
    raise SystemExit(main())

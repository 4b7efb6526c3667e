"""What gpu.py found, as a table for BENCHMARKS.md and as pictures."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np

PUBLISHED = 1316  # tokens/s at batch 1 on an H200: a megakernel, measured in msaroufim/megakernels-vs-cuda-graphs


def plain(value):
    """What JSON can hold: keys as text, NumPy's numbers as Python's, nothing infinite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find(results: dict, *path):
    """The value at a path of keys below the stages, or None."""
    value = results["stages"]
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def targets(results: dict) -> list[tuple[str, float, float, str, float | None, str]]:
    """(what, target, aim, unit, measured, and a remark) of each row of the table in BENCHMARKS.md."""
    rows = []
    for batch, context, target, aim in ((1, 128, 72, 80), (32, 512, 60, 70), (128, 512, 55, 65)):
        engine = find(results, "decode", "1B", "engine", f"{batch} at {context}") or {}
        step = find(results, "decode", "1B", "replayed", context, batch) or {}
        remark = f"{number(engine.get('tokens_per_s'))} tok/s; steps alone {number(step.get('percent'))} %, " \
                 f"{number(step.get('tokens_per_s'))} tok/s"
        rows.append((f"decode, batch {batch}, context {context}, of the floor at the copy bandwidth", target, aim, "%",
                     engine.get("percent"), remark))
    ours, theirs = (find(results, *path, "tokens_per_s") for path in (
        ("decode", "1B", "engine", "1 at 128"), ("transformers", "1")))
    ratio = ours / theirs if ours and theirs else None
    remark = find(results, "transformers", "skipped") or find(results, "transformers", "error") or ""
    rows.append(("against transformers with torch.compile, batch 1", 2, 3, "x", ratio,
                 f"{number(theirs)} tok/s" if theirs else str(remark)[:60]))
    prefill = find(results, "prefill", 2048) or {}
    rows.append(("prefill of 2048 tokens, of the matrix rate", 50, 65, "%", prefill.get("percent"),
                 f"{number(prefill.get('tokens_per_s'))} tok/s; step alone {number(prefill.get('step_percent'))} %"))
    served = find(results, "served", 64) or {}
    rows.append(("64 streams over HTTP against the bare engine", 90, 95, "%", served.get("percent"),
                 f"{number(served.get('served_tokens_per_s'))} of {number(served.get('bare_tokens_per_s'))} tok/s"))
    return rows


def number(value, digits: int = 3) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    if value and not 0.001 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def table(*rows) -> str:
    """Markdown, the first row as head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def targets_table(results: dict) -> str:
    rows = [("", "target", "aim", "measured", "met", "")]
    for what, target, aim, unit, value, remark in targets(results):
        met = "aim" if value and value >= aim else "yes" if value and value >= target else "no"
        met = "dry run" if results["dry_run"] else "not measured" if value is None else met
        measured = f"{number(value)} {unit}" if value else "-"
        rows.append((what, f"{target} {unit}", f"{aim} {unit}", measured, met, remark))
    return table(*rows)


def decode_table(results: dict, name: str) -> str:
    """Tokens a second and percent of the floor by batch and context, steps alone."""
    replayed = find(results, "decode", name, "replayed")
    if not replayed:
        return ""
    batches = list(next(iter(replayed.values())))
    rows = [(f"{name}: tok/s (% of the floor)", *(f"context {context}" for context in replayed))]
    for batch in batches:
        rows.append((f"batch {batch}", *(cell(column.get(batch), "tokens_per_s") for column in replayed.values())))
    return "\n\n".join([table(*rows), variants_line(results, name)])


def cell(entry: dict | None, key: str, factor: float = 1) -> str:
    """A number and the percentage beside it."""
    entry = entry or {}
    value = entry.get(key)
    return f"{number(value * factor if value else None)} ({number(entry.get('percent'))})"


def variants_line(results: dict, name: str) -> str:
    """Kernels of a step, and tokens a second without graphs or programmatic launch; then through the engine."""
    found = find(results, "decode", name)
    parts = [f"{found['launches']['kernels']} kernels a step at batch 1"] if "launches" in found else []
    for what, rows in found["variants"].items():
        rates = (f"batch {batch} {number(row['tokens_per_s'])} tok/s" for batch, row in rows.items())
        parts.append(f"{what}: {', '.join(rates)}")
    for what, row in found["engine"].items():
        parts.append(f"engine, batch {what}: {number(row['tokens_per_s'])} tok/s ({number(row['percent'])} %)")
    return "; ".join(parts)


def kernel_table(results: dict, name: str) -> str:
    """Percent of the copy bandwidth (decode) or of the matrix rate (prefill) of each op."""
    decode, prefill = (find(results, "kernel_speed", name, part) or {} for part in ("decode", "prefill"))
    if not decode:
        return ""
    columns = {**{f"T = {tokens}": ops for tokens, ops in decode.items()},
               **{f"prefill {tokens}": ops for tokens, ops in prefill.items()}}
    ops = list(dict.fromkeys(op for column in columns.values() for op in column))
    rows = [(f"{name}: us (% of copy bandwidth or matrix rate)", *columns)]
    for op in ops:
        rows.append((op, *(cell(column.get(op), "seconds", 1e6) for column in columns.values())))
    return table(*rows)


def attention_table(results: dict, name: str) -> str:
    """Attention of decoding rows, by context and number of rows."""
    by_context = find(results, "kernel_speed", name, "attention_decode") or {}
    if not by_context:
        return ""
    counts = list(next(iter(by_context.values())))
    rows = [(f"context {context}", *(cell(column[count], "seconds", 1e6) for count in counts))
            for context, column in by_context.items()]
    head = (f"{name}: attention, us (% of copy bandwidth)", *(f"{count} rows" for count in counts))
    return table(head, *rows)


def sampling_table(results: dict, name: str) -> str:
    """The target is 30 us."""
    by_rows = find(results, "kernel_speed", name, "sample") or {}
    if not by_rows:
        return ""
    kinds = list(next(iter(by_rows.values())))
    rows = [(f"{count} rows", *(number(times[kind] * 1e6) for kind in kinds)) for count, times in by_rows.items()]
    return table((f"{name}: us to draw (target 30)", *kinds), *rows)


def other_numbers(results: dict) -> str:
    rows = (("1B, process start to ready, kernels not compiled, s", ("load", "cold", "ready_s")),
            ("1B, process start to ready, s", ("load", "warm", "ready_s")),
            ("1B, process start to first answer, s", ("load", "warm", "first_answer_s")),
            ("upload, bytes/s", ("load", "warm", "upload_bytes_per_s")),
            ("KL divergence, random weights", ("accuracy", "random model", "kl_mean")),
            ("KL divergence, demo model", ("accuracy", "demo model", "kl_mean")),
            ("perplexity against float32, demo model, %", ("accuracy", "demo model", "perplexity_difference_percent")))
    return table(("", ""), *((what, number(find(results, *path))) for what, path in rows))


def markdown(results: dict) -> str:
    """Everything, ready for BENCHMARKS.md."""
    card = results["stages"].get("card", {})
    copy, read, matrix = (number(card.get(f"{what}_per_s")) for what in ("copy_bytes", "read_bytes", "matrix_flops"))
    head = (f"`{results['command']}`, {results['date']}: {card.get('name', 'no name')}, {card.get('multiprocessors')} "
            f"multiprocessors, driver {card.get('driver_version', card.get('cuda_driver'))}, CuPy {card.get('cupy')}, "
            f"NVRTC {card.get('nvrtc')}; copy {copy} bytes/s, read {read} bytes/s, matrices {matrix} FLOP/s. Random "
            "weights, bf16, medians.")
    said = lambda entry: str(entry.get("error", "")).replace("\n", " ").replace("|", "/")[:200]
    stages = [(name, entry["status"], number(entry.get("seconds")), said(entry))
              for name, entry in results["stages"].items()]
    parts = [head, table(("stage", "", "s", ""), *stages), targets_table(results), *(
        part(results, name) for name in ("1B", "8B")
        for part in (decode_table, kernel_table, attention_table, sampling_table)),
        other_numbers(results)]
    if results["dry_run"]:
        parts.insert(0, "DRY RUN: tiny shapes on the stand-in for CuPy; the times say nothing of a card.")
    return "\n\n".join(filter(None, parts)) + "\n"


# ------------------------------------------------------------------------------
# pictures

def draw(results: dict, out: Path) -> None:
    """decode.svg and kernels.svg, where matplotlib is installed and there is something to show."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no pictures: matplotlib is not installed")
    for name, picture in (("decode", draw_decode), ("kernels", draw_kernels)):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        try:
            if picture(results, figure):
                figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        except Exception as error:  # the numbers are safe in results.json
            print(f"no {name}.svg: {error!r}")


def clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.08)


def draw_decode(results: dict, figure) -> bool:
    """Tokens a second over the batch, one line a context, with the floor's line and the targets."""
    replayed, copy = find(results, "decode", "1B", "replayed"), find(results, "card", "copy_bytes_per_s")
    if not replayed or not copy:
        return False
    rates, parts = figure.subplots(1, 2)
    for context, column in replayed.items():
        points = [(batch, row) for batch, row in column.items() if row and row["tokens_per_s"]]
        batches = [batch for batch, _ in points]
        line, = rates.plot(batches, [row["tokens_per_s"] for _, row in points], "o-", label=f"context {context}")
        rates.plot(batches, [batch * copy / row["floor_bytes"] for batch, row in points], ":", color=line.get_color())
        parts.plot(batches, [row["percent"] for _, row in points], "o-", color=line.get_color())
    parts.plot([1, 32, 128], [72, 60, 55], "k_", markersize=14, label="target")
    parts.plot([1, 32, 128], [80, 70, 65], "k^", markersize=5, label="aim")
    rates.axhline(PUBLISHED, color="grey", linewidth=0.7)
    rates.text(256, PUBLISHED * 1.06, "published for batch 1 on an H200", fontsize=7, color="grey", ha="right")
    rates.set(yscale="log", title="Llama-3.2-1B decode, tokens/s (dotted: floor)", xlabel="batch")
    parts.set(title="percent of the floor", xlabel="batch", ylim=(0, 105))
    for axes in (rates, parts):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.legend(frameon=False, fontsize=7)
        clean(axes)
    return True


def draw_kernels(results: dict, figure) -> bool:
    """Percent of the copy bandwidth of each op, by the number of tokens."""
    models = [name for name in ("1B", "8B") if isinstance(find(results, "kernel_speed", name), dict)]
    if not models or not find(results, "card", "copy_bytes_per_s"):
        return False
    for axes, name in zip(np.ravel(figure.subplots(1, len(models), sharey=True)), models):
        decode = find(results, "kernel_speed", name, "decode")
        ops = list(next(iter(decode.values())))
        for at, (tokens, column) in enumerate(decode.items()):
            heights = [(column.get(op) or {}).get("percent") or 0 for op in ops]
            axes.bar(np.arange(len(ops)) + (at - len(decode) / 2) * 0.8 / len(decode), heights, 0.8 / len(decode),
                     label=f"T = {tokens}")
        axes.set_xticks(range(len(ops)), ops)
        axes.set_title(f"{name}: percent of the copy bandwidth")
        clean(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=7)
    return True

"""README.md of an exported model: what it is, what it was trained on, for how long, how good it is."""

import contextlib
import json
from pathlib import Path

from trainit import __version__


def text(workdir: Path, meta: dict, step: int, architecture: str) -> str:
    """The model card of a checkpoint, with a head that model hubs read."""
    config, facts = meta["config"], _json(workdir / "run.json")
    rows = {
        "architecture": f"{architecture}, {facts.get('parameters', 0):,} parameters"
        if facts
        else architecture,
        "data": f"{config['dataset']['path']} {config['dataset']['mixture']}".strip(),
        "steps": f"{step:,} of {config['steps']:,}",
        "tokens": f"{meta['tokens']:,}" if "tokens" in meta else "",
        "batch": f"{config['batch_size']:,} sequences of {config['model']['context_length']:,} tokens",
        "optimizer": f"{config['optimizer']['name']}, learning rate {config['optimizer']['learning_rate']:g}",
        "precision": config["precision"],
        **_validation(workdir / "metrics.jsonl", step),
        "versions": facts.get("versions", f"Trainit {meta['version']}"),
        "written by": f"Trainit {__version__}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
    return f"{head}# {workdir.resolve().name}\n\n| | |\n| --- | --- |\n" + "\n".join(lines) + "\n"


def _validation(path: Path, step: int) -> dict[str, str]:
    """The newest validation up to a step, of metrics.jsonl."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a crash leaves an unfinished line
            records += [record] if (record := json.loads(line))["step"] <= step else []
    found = next((record for record in reversed(records) if record.get("valid/loss") is not None), None)
    if found is None:
        return {}
    bits = found.get("valid/bits_per_byte")
    more = f", {bits:.4f} bits per byte" if bits is not None else ""
    return {
        "validation": f"loss {found['valid/loss']:.4f} nats per token{more}, after {found['step']:,} steps"
    }


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}

"""Which chains are planners measured on? Real ones, captured once and kept as JSON beside this file.

`python -m benchmarks.chains.capture --help` says how they were made. A file holds equal costs once: `kinds` are the
costs of a block, `blocks` name the kind of each, and the storages that each of its options aliases.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinybp_lightning.graph import Block, Boundary, Chain, SavedSet, StorageId, verify_chain

__all__ = ["chain_from_json", "chain_names", "chain_to_json", "load_chain"]

_FOLDER = Path(__file__).parent


def chain_names() -> tuple[str, ...]:
    """Return the names of the chains that are kept here."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_chain(name: str) -> Chain:
    """Return the kept chain `name`, one of `chain_names()`, verified."""
    return chain_from_json((_FOLDER / f"{name}.json").read_text())


def chain_to_json(chain: Chain, *, made_by: str) -> str:
    """Return `chain` as compact JSON text; `made_by` says how to make it again."""
    kinds: dict[str, int] = {}
    blocks = list[list[object]]()
    for block in chain.blocks:
        costs = asdict(block)
        aliases = [list(option.pop("storages")) for option in costs["options"]]
        name = costs.pop("name")
        kind = kinds.setdefault(json.dumps(costs), len(kinds))
        blocks.append([name, kind, aliases])
    lines = {
        "made_by": json.dumps(made_by),
        "unmodelled_bytes": chain.unmodelled_bytes,
        "tail_peak_bytes": chain.tail_peak_bytes,
        "tail_live_bytes": chain.tail_live_bytes,
        "storage_bytes": json.dumps(chain.storage_bytes),
        "boundaries": json.dumps([[b.gradient_bytes, *b.storages] for b in chain.boundaries]),
        "kinds": "[\n" + ",\n".join(kinds) + "\n]",
        "blocks": "[\n" + ",\n".join(json.dumps(block) for block in blocks) + "\n]",
    }
    return "{\n" + ",\n".join(f'"{key}": {value}' for key, value in lines.items()) + "\n}\n"


def chain_from_json(text: str) -> Chain:
    """Return the chain that `chain_to_json` wrote, verified."""
    data: dict[str, Any] = json.loads(text)
    chain = Chain(
        storage_bytes=tuple(data["storage_bytes"]),
        blocks=tuple(_block(name, data["kinds"][kind], aliases) for name, kind, aliases in data["blocks"]),
        boundaries=tuple(
            Boundary(tuple(map(StorageId, storages)), gradient_bytes)
            for gradient_bytes, *storages in data["boundaries"]
        ),
        tail_peak_bytes=data["tail_peak_bytes"],
        tail_live_bytes=data["tail_live_bytes"],
        unmodelled_bytes=data["unmodelled_bytes"],
    )
    verify_chain(chain)
    return chain


def _block(name: str, costs: dict[str, Any], aliases: list[list[int]]) -> Block:
    options = tuple(
        SavedSet(**option, storages=tuple(map(StorageId, storages)))
        for option, storages in zip(costs["options"], aliases, strict=True)
    )
    of_block: dict[str, Any] = {**costs, "options": options}
    return Block(name=name, **of_block)

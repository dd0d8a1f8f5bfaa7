"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Source = Annotated[str, typer.Argument(help="A .safetensors file, a folder, or a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")]
Token = Annotated[Optional[str], typer.Option(help="Access token of the hub.")]
CacheDir = Annotated[Optional[Path], typer.Option(help="Where hub files are cached.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use the hub's local cache only.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read a hub id by byte ranges; keep nothing on disk.")
]
KeepShards = Annotated[
    bool,
    typer.Option(
        "--keep-shards/--drop-shards", help="Keep a hub id's files, or drop each when it is done."
    ),
]
Include = Annotated[
    Optional[list[str]], typer.Option(help="Only tensors like this, as '*self_attn*'; repeatable.")
]
Exclude = Annotated[Optional[list[str]], typer.Option(help="No tensors like this; repeatable.")]
OutFile = Annotated[
    Optional[Path], typer.Option("--output", "-o", help="Where to write; - is stdout.")
]
ESTIMATOR_HELP = "official, paper, band, median, ks, kde, kde-band or kde-mean."
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 where it is computed in.")
]

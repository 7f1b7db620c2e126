"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

DeviceOption = Annotated[
    str,
    typer.Option(envvar="BERT_EVALUATION_DEVICE", help="auto, cpu, cuda, cuda:N or mps; auto is the best one present"),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(envvar="BERT_EVALUATION_STORE", help="keep results in this file; :memory: for nowhere"),
]

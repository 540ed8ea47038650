"""Arguments and options that several commands have in common."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A folder with config.json and *.safetensors, a Hugging Face id such as "
        "Qwen/Qwen3-0.6B, or 'demo'.",
        show_default="the demo model, SmolLM2-135M-Instruct",
    ),
]
TensorParallel = Annotated[
    int, typer.Option("--tp", min=1, help="Over how many ranks the model is cut.")
]
DataTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DataType = Annotated[
    DataTypeName,
    typer.Option("--dtype", help="Type of weights and KV cache; auto is the checkpoint's."),
]
DeviceName = Literal["auto", "cpu", "cuda"]
DEVICE_HELP = "Where the shards live; auto is a GPU for each rank, or CPUs where no GPU is visible."
MemoryWeights = Annotated[
    str | None,
    typer.Option(
        "--memory-weights",
        metavar="A,B,...",
        help="Relative shares of the model, one a rank, for ranks of unequal memory.",
        show_default="equal shares",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="HOST:PORT", help="The coordinator.", show_default="localhost:50051"
    ),
]
Tls = Annotated[
    Path | None,
    typer.Option(
        "--tls",
        metavar="PATH",
        envvar="COLROW_TLS",
        help="Call over TLS: a folder of `colrow certs`, or a file of CA certificates.",
        show_default="not encrypted",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="COLROW_API_KEY",
        help="Where the coordinator asks for one. Others see the arguments of a command; the variable "
        "they don't.",
    ),
]
Temperature = Annotated[
    float, typer.Option(help="0 always takes the likeliest token; 1 samples as trained.")
]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample among the k likeliest tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample among the tokens that make up this probability.")
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Sample among the tokens at least this many times as likely as the likeliest."
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")]
System = Annotated[str | None, typer.Option(help="System message of the chat.")]
Json = Annotated[bool, typer.Option("--json", help="Print data instead of tables.")]

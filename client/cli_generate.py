"""The commands that have a model write: `generate` and `chat`."""

import functools
import sys
from typing import Annotated

import typer

from client.options import (
    ApiKey,
    MinP,
    Seed,
    System,
    Target,
    Temperature,
    Tls,
    TopK,
    TopP,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or answer; - reads stdin.")],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Render PROMPT with the model's chat template, or take it as it is.",
            show_default="chat if the model has a template",
        ),
    ] = None,
    system: System = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 256,
    min_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens to generate before the text may end.")
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: what the prompt or the text has already becomes less likely."),
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: what the text has already becomes less likely.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same, for each time that the text has it.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the text before this one. May be given several times."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on where the model would end.")
    ] = False,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many continuations.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Show how likely each token was, and the N likeliest in its place.",
        ),
    ] = None,
    target: Target = None,
    tls: Tls = None,
    api_key: ApiKey = None,
) -> None:
    """Stream the answer to a prompt.

    With no cluster running, the demo model is started for it.

    Example: colrow generate "What is the capital of Japan?" --max-tokens 32
    """
    from client.answer import logprobs_table, stream_answer
    from client.serving import connected_or_demo, termination_interrupts
    from client.views import console

    text = sys.stdin.read() if prompt == "-" else prompt
    messages = console(stderr=True)
    with (
        termination_interrupts(),
        connected_or_demo(target, tls, api_key, messages) as (colrow, model),
    ):
        as_chat = model.has_chat_template if chat is None else chat
        if system is not None and not as_chat:
            raise ValueError("system: needs a chat; leave out --raw, or the model has no template")
        answer = stream_answer(
            colrow,
            _as_messages(text, system) if as_chat else text,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            stop=stop,
            ignore_eos=ignore_eos,
            n=n,
            logprobs=logprobs,
        )
        if logprobs is not None:
            text_of = functools.cache(lambda token: colrow.detokenize([token]))
            for index, tokens in enumerate(answer.logprobs):
                title = "Tokens" if n == 1 else f"Tokens of {index + 1}"
                console().print(logprobs_table(title, tokens, text_of))
        messages.print(answer.summary, style="dim")


def _as_messages(question: str, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def chat(
    system: System = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    temperature: Temperature = 0.6,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    target: Target = None,
    tls: Tls = None,
    api_key: ApiKey = None,
) -> None:
    """Talk with the model, in turns.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists what else there is.

    Without a terminal each line of stdin is a question.

    With no cluster running, the demo model is started for it.

    Example: colrow chat --system "Answer in one sentence."
    """
    from client.chat import Chat, make_reader
    from client.serving import connected_or_demo, termination_interrupts
    from client.views import console

    messages = console(stderr=True)
    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    with (
        termination_interrupts(SystemExit),  # an interrupt ends the answer only
        connected_or_demo(target, tls, api_key, messages) as (colrow, model),
    ):
        Chat(colrow, model, messages, system=system, settings=settings).run(make_reader(messages))

"""The cluster from the first contact with its workers to serving, and what operators see of it."""

import asyncio
import contextlib
import enum
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colrow.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ServiceError,
    Unavailable,
)
from colrow.memory import MemoryLedger
from coordinator.block_manager import BlockManager
from coordinator.config import (
    DEFAULT_CPU_BATCHED_TOKENS,
    DEFAULT_CPU_CACHE_MIB,
    DEFAULT_GPU_BATCHED_TOKENS,
    CoordinatorConfig,
)
from coordinator.engine import Engine, Observer
from coordinator.families import Fields, model_spec
from coordinator.memory_plan import (
    MemorySettings,
    StepLimits,
    cache_room,
    check_fits,
    planned,
)
from coordinator.model_spec import ModelSpec
from coordinator.request import ModelLimits
from coordinator.scheduler import Scheduler
from coordinator.shard_group import TAKEN, ShardGroup
from coordinator.shard_plan import ShardPlan, make_plan
from coordinator.tokenizer import Tokenizer
from coordinator.worker_status import Phase, WorkerDescription

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
CHARACTERS_A_TOKEN = 16  # at most, in a text of many; texts have 4 or 5
STATUS_TIMEOUT_S = 2.0
RECOVERY_ATTEMPT_S = 10.0  # for lost workers to be back, before it is tried anew
RECOVERY_PAUSE_S = 0.2
GIVEN_UP_RETRY_S = 10.0
MAX_REFUSALS = 3  # of steps in a row, after which it is the requests that fail and not a worker
REFUSED_PAUSE_S = 2.0
# What a worker answers that is there and can't do what it is asked to.
_REFUSALS = frozenset({"INTERNAL", "UNKNOWN", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"})


class State(enum.Enum):
    CONNECTING = "connecting"
    JOINING = "joining"
    LOADING = "loading"
    SERVING = "serving"
    RECOVERING = "recovering"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk, its weights unread."""

    path: Path
    config_json: str
    spec: ModelSpec
    tokenizer: Tokenizer | None

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Reads config and tokenizer; ValueError naming what is missing or not supported."""
        file = path / CONFIG_FILE
        if not file.is_file():
            raise InvalidArgument("model", str(path), f"is no folder with a {CONFIG_FILE}")
        text = file.read_text(errors="replace")
        spec = model_spec(parse_config(text, CONFIG_FILE))
        if (file := path / GENERATION_CONFIG_FILE).is_file():
            # Chat models often end their turns with a token that only this file names.
            generation = parse_config(file.read_text(errors="replace"), GENERATION_CONFIG_FILE)
            fields = Fields(generation, prefix=f"{GENERATION_CONFIG_FILE}: ")
            ids = fields.token_ids("eos_token_id", None)
            spec = replace(spec, eos_token_ids=tuple({*spec.eos_token_ids, *ids}))
        tokenizer = Tokenizer.load(path)
        if tokenizer is not None:
            long = CHARACTERS_A_TOKEN * spec.max_position_embeddings
            tokenizer.max_characters = max(tokenizer.max_characters, long)
        return cls(path.resolve(), text, spec, tokenizer)


def parse_config(text: str, field: str = "config_json") -> dict[str, Any]:
    """The object of a config.json; InvalidArgument of `field` where the text is none."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(field, text, str(error)) from error
    if not isinstance(config, dict):
        raise InvalidArgument(field, text, "is no JSON object")
    return config


class Cluster:
    """One model on one group of workers."""

    def __init__(
        self,
        config: CoordinatorConfig,
        model: ModelFolder,
        group: ShardGroup,
        *,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.model = model
        self.group = group
        self.state = State.CONNECTING
        self._state_since = clock()
        self.error = ""
        self.plan: ShardPlan | None = None
        self.scheduler: Scheduler | None = None
        self.engine_or_none: Engine | None = None
        self._observer = observer
        self._clock = clock
        self.num_recoveries = 0
        self.last_recovery_s = 0.0
        self._failing_since = 0.0  # since when requests wait and no step of theirs came through
        self._steps_then = -1
        self._num_refusals = 0
        self.is_draining = False
        self._limits: ModelLimits | None = None
        self._num_blocks = 0
        self._planned: list[MemoryLedger] = []
        self._changed = asyncio.Event()
        self._num_calls = 0
        self._call_ended = asyncio.Event()

    @property
    def state_age_s(self) -> float:
        return self._clock() - self._state_since

    @property
    def engine(self) -> Engine:
        """The engine while the cluster serves; Unavailable, with a time to retry, before and after.

        While it recovers from the loss of a worker requests are taken too: they wait.
        """
        if self.is_draining:
            raise Unavailable(
                "the coordinator finishes what runs and takes nothing new",
                reason="DRAINING",
                retry_after_s=1.0,
            )
        if self.engine_or_none is None or self.state not in (State.SERVING, State.RECOVERING):
            raise Unavailable(
                f"the cluster is {self.state.value}" + (f": {self.error}" if self.error else ""),
                reason="NOT_SERVING",
                retry_after_s=1.0,
            )
        return self.engine_or_none

    @contextlib.contextmanager
    def call(self) -> Iterator[Engine]:
        """Around all that one call of a user does with the engine; Unavailable as `engine` raises it.

        A drain lets it finish. A call is more than a request: those of a batch start one after the
        other.
        """
        engine = self.engine
        self._num_calls += 1
        try:
            yield engine
        finally:
            self._num_calls -= 1
            self._call_ended.set()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and completion together; known before the cluster serves."""
        if self._limits is not None:
            return self._limits.context_length
        limit = self.model.spec.max_position_embeddings
        return min(limit, self.config.max_model_len or limit)

    async def run(self) -> None:
        """Brings the cluster up and steps it until cancelled, through any number of lost workers.

        Raises ServiceError or ValueError, kept in `error` too, when it can't come up at first, and
        ServiceError when another coordinator has taken a worker.
        """
        try:
            engine = await self._start()
        except (ServiceError, ValueError) as error:
            await self._fail(error)
            raise
        try:
            while True:
                self._set_state(State.DRAINING if self.is_draining else State.SERVING)
                try:
                    await self._step(engine)
                except ServiceError as error:
                    if error.reason == TAKEN:
                        raise
                    await self._recover(engine, error)
        except asyncio.CancelledError:
            engine.fail(Unavailable("the coordinator has stopped", reason="STOPPED"))
            raise
        except ServiceError as error:
            engine.fail(Unavailable(str(error), reason=error.reason))
            await self._fail(error)
            raise
        except Exception as error:
            engine.fail(Internal(f"the coordinator failed: {error!r}"))
            await self._fail(error)
            raise

    async def _fail(self, error: Exception) -> None:
        self.error = str(error)
        log.error("the cluster failed: %s", error)
        self._set_state(State.FAILED)
        await self.group.abort()

    async def _step(self, engine: Engine) -> None:
        """Until a step fails, or a worker gives no sign of life."""
        tasks = (
            asyncio.create_task(engine.run()),
            asyncio.create_task(self.group.watch(self.config.heartbeat_timeout_s)),
        )
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _recover(self, engine: Engine, error: ServiceError) -> None:
        """Forms the group anew, however long that takes; requests wait for `recovery_timeout_s`.

        Requests whose steps fail the workers again and again end before.
        """
        began = self._clock()
        self._note_failure(engine, error)
        self.num_recoveries += 1
        self.error = str(error)
        log.error("epoch %d ended: %s", self.group.epoch, error)
        for status in self.group.statuses:
            log.warning(
                "%s is %s, its last completed step %d%s",
                *(status.name, status.phase.value, status.last_step_id),
                f"; {status.error}" if status.phase is Phase.LOST else "",
            )
        self._set_state(State.RECOVERING)
        left_s = self._failing_since + self.config.recovery_timeout_s - began
        giving_up = None
        if left_s > 0:
            loop = asyncio.get_running_loop()
            giving_up = loop.call_later(left_s, self._give_requests_up, engine)
        else:
            self._give_requests_up(engine)
        try:
            await self._form_anew()
        finally:
            if giving_up is not None:
                giving_up.cancel()
        self.error = ""
        self.last_recovery_s = self._clock() - began
        log.info("epoch %d goes on after %.2f s", self.group.epoch, self.last_recovery_s)

    async def _form_anew(self) -> None:
        """However often it takes; ServiceError when another coordinator has taken a worker."""
        while True:
            await self.group.abort()
            self._notify()
            try:
                await self._form(RECOVERY_ATTEMPT_S)
                return
            except ServiceError as failure:
                if failure.reason == TAKEN:
                    raise
                self.error = str(failure)
                log.warning("the group can't form: %s", failure)
                self._notify()
                refused = failure.code in _REFUSALS
                await asyncio.sleep(REFUSED_PAUSE_S if refused else RECOVERY_PAUSE_S)

    def _note_failure(self, engine: Engine, error: ServiceError) -> None:
        """Tells a worker that is lost from requests that no worker can serve."""
        if engine.num_steps != self._steps_then or not engine.has_requests:
            self._steps_then = engine.num_steps
            self._failing_since = self._clock()
            self._num_refusals = 0
        self._num_refusals += error.code in _REFUSALS
        if self._num_refusals >= MAX_REFUSALS:
            log.error("steps failed %d times in a row: requests fail", self._num_refusals)
            engine.drop(
                Internal(f"the workers can't execute the step: {error}", reason="STEP_FAILED")
            )
            self._num_refusals = 0

    def _give_requests_up(self, engine: Engine) -> None:
        limit = self.config.recovery_timeout_s
        log.error("not recovered within %g s: requests fail", limit)
        engine.fail(
            Unavailable(
                f"the cluster has not recovered within {limit:g} s: {self.error}",
                reason="NOT_RECOVERED",
                retry_after_s=GIVEN_UP_RETRY_S,
            )
        )

    async def _form(self, timeout_s: float) -> None:
        """Joins the workers, in a new epoch, and has them loaded and ready for step 1."""
        assert self.plan is not None
        await self.group.describe(timeout_s)
        self._notify()
        self.group.check_versions()
        if self.group.epoch:
            self.group.check_not_taken()
        await self.group.join(self.group.choose_transport(self.config.transport))
        if self.state is not State.RECOVERING:
            self._set_state(State.LOADING)
        await self.group.load(
            self.model.path,
            self.model.config_json,
            self.plan,
            self.config.load_format,
            self._notify,
        )
        if self._limits is None:
            # What a GPU has left is known once the weights are there.
            descriptions = await self.group.describe(timeout_s)
            settings = self._memory_settings()
            self._planned = [
                planned(self.plan, rank, description, settings)
                for rank, description in enumerate(descriptions)
            ]
            self._num_blocks, self._limits = self._size_cache(self.plan, descriptions, settings)
        await self.group.allocate(
            self._num_blocks, self.config.block_size, self._limits.context_length, self._planned
        )

    async def _start(self) -> Engine:
        config, spec = self.config, self.model.spec
        descriptions = await self.group.describe(config.startup_timeout_s)
        self.group.check_versions()
        for status in self.group.statuses:
            supported = status.description.supported_architectures if status.description else ()
            if spec.architecture not in supported:
                raise FailedPrecondition(
                    f"{status.name} supports {', '.join(supported)}, not {spec.architecture}"
                )
        weights = config.memory_weights
        if config.memory_weighted:
            weights = tuple(float(d.memory_available_bytes) for d in descriptions)
        self.plan = make_plan(spec, self.group.size, dtype=config.dtype, memory_weights=weights)
        check_fits(self.plan, descriptions, self._memory_settings())
        self._set_state(State.JOINING)
        await self._form(config.startup_timeout_s)
        assert self._limits is not None
        # Once the workers have room for so many blocks, an account of them is no risk.
        self.scheduler = Scheduler(
            BlockManager(self._num_blocks, config.block_size, prefix_caching=config.prefix_caching),
            max_batched_tokens=self.max_batched_tokens,
            max_running=config.max_running,
        )
        self.engine_or_none = Engine(
            self.group,
            self.scheduler,
            self._limits,
            self.model.tokenizer,
            run_ahead=config.run_ahead,
            max_waiting=config.max_waiting,
            observer=self._observer,
        )
        return self.engine_or_none

    @property
    def max_batched_tokens(self) -> int:
        """Of a step. Known when the workers have said what they are."""
        if self.config.max_batched_tokens is not None:
            return self.config.max_batched_tokens
        on_gpu = all(
            status.description.is_gpu for status in self.group.statuses if status.description
        )
        default = DEFAULT_GPU_BATCHED_TOKENS if on_gpu else DEFAULT_CPU_BATCHED_TOKENS
        # Every running sequence gets its token.
        return max(default, self.config.max_running)

    def _memory_settings(self) -> MemorySettings:
        """InvalidArgument for a context that the model has not."""
        config, size = self.config, self.config.block_size
        context = self.model.spec.max_position_embeddings
        if config.max_model_len is not None and config.max_model_len > context:
            raise InvalidArgument(
                "max_model_len", config.max_model_len, f"the model's context is {context}"
            )
        # A context that nobody asked for is cut to what there is room for.
        least = config.max_model_len or 1
        return MemorySettings(
            limits=StepLimits(self.max_batched_tokens, config.max_running, self.context_length),
            least_cache_tokens=-(-least // size) * size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            is_cache_given=config.num_blocks is not None or config.kv_cache_bytes is not None,
        )

    def _size_cache(
        self,
        plan: ShardPlan,
        descriptions: Sequence[WorkerDescription],
        settings: MemorySettings,
    ) -> tuple[int, ModelLimits]:
        """Blocks of the KV cache, as many as fit on every rank, and the context."""
        config, spec, context = self.config, self.model.spec, self.context_length
        num_blocks = config.num_blocks
        if num_blocks is None:
            # Sequences that fill the batch with whole contexts are all the cache could be used for.
            num_blocks = config.max_running * -(-context // config.block_size)
            for shard, description in zip(plan.ranks, descriptions, strict=True):
                if config.kv_cache_bytes is not None:
                    room = config.kv_cache_bytes
                elif description.is_gpu:
                    room = cache_room(plan, shard.rank, description, settings)
                else:
                    room = DEFAULT_CPU_CACHE_MIB * 2**20
                block_bytes = config.block_size * shard.kv_bytes_per_token
                num_blocks = min(num_blocks, room // block_bytes)
                if num_blocks < 1:
                    raise InvalidArgument(
                        "kv_cache_mib",
                        room / 2**20,
                        f"a block of {config.block_size} tokens takes {block_bytes} bytes on rank "
                        f"{shard.rank} ({description.device}: {description.memory})",
                    )
        cache_tokens = num_blocks * config.block_size
        context = min(context, cache_tokens)
        return num_blocks, ModelLimits(spec.vocab_size, context, spec.eos_token_ids, cache_tokens)

    async def drain(self) -> None:
        """Takes no new calls from now on; returns when those that run have ended."""
        self.is_draining = True
        if self.state is State.SERVING:
            self._set_state(State.DRAINING)
        while self._num_calls:
            self._call_ended.clear()
            await self._call_ended.wait()

    def _set_state(self, state: State) -> None:
        if state is not self.state:
            self.state, self._state_since = state, self._clock()
        log.info("the cluster is %s", state.value)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def refresh(self) -> None:
        """Asks every worker for its state of now."""
        await self.group.refresh(STATUS_TIMEOUT_S)

    async def changes(self, interval_s: float | None) -> AsyncIterator[None]:
        """Yields at once, then after each change and after `interval_s` seconds without one."""
        while True:
            changed = self._changed
            yield
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await changed.wait()

    async def stop(self) -> None:
        """Ends the epoch, so that the workers are free for another coordinator."""
        if self.state is not State.FAILED:
            self._set_state(State.STOPPED)
            await self.group.abort()
        await self.group.close()

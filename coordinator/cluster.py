"""The cluster from the first contact with its workers to serving, and what operators see of it."""

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np

from colrow.errors import (
    FailedPrecondition,
    Internal,
    ServiceError,
    Unavailable,
)
from colrow.memory import MemoryLedger
from coordinator.block_manager import BlockManager
from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine, Observer
from coordinator.memory_plan import (
    MemorySettings,
    check_fits,
    memory_settings,
    planned,
    size_cache,
    wanted_context,
)
from coordinator.model_folder import ModelFolder
from coordinator.request import ModelLimits
from coordinator.scheduler import Scheduler
from coordinator.shard_group import TAKEN, Partial, ShardGroup
from coordinator.shard_plan import ShardPlan, make_plan
from coordinator.worker_status import STALE_EPOCH, Phase

log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 2.0
RECOVERY_ATTEMPT_S = 10.0  # for lost workers to be back, before it is tried anew
RECOVERY_PAUSE_S = 0.2
GIVEN_UP_RETRY_S = 10.0
MAX_REFUSALS = 3  # of steps in a row, after which it is the requests that fail and not a worker
REFUSED_PAUSE_S = 2.0
# What a worker answers that is there and can't do what it is asked to.
_REFUSALS = frozenset({"INTERNAL", "UNKNOWN", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"})
# What is heard of a worker that is gone, or leaves the group.
_LOSSES = frozenset({"UNAVAILABLE", "ABORTED"})


class State(enum.Enum):
    CONNECTING = "connecting"
    JOINING = "joining"
    LOADING = "loading"
    SERVING = "serving"
    RECOVERING = "recovering"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


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
        self._stage = State.CONNECTING
        self._is_draining = False
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
        self._limits: ModelLimits | None = None
        self._num_blocks = 0
        self._memory: MemorySettings | None = None
        self._planned: list[MemoryLedger] = []
        self._changed = asyncio.Event()
        self._num_calls = 0
        self._call_ended = asyncio.Event()

    @property
    def state(self) -> State:
        """One that takes nothing new is DRAINING where it would be SERVING."""
        if self._is_draining and self._stage is State.SERVING:
            return State.DRAINING
        return self._stage

    @property
    def state_age_s(self) -> float:
        return self._clock() - self._state_since

    @property
    def engine(self) -> Engine:
        """The engine while the cluster serves; Unavailable, with a time to retry, before and after.

        While it recovers from the loss of a worker requests are taken too: they wait.
        """
        if self._is_draining:
            raise Unavailable(
                "the coordinator finishes what runs and takes nothing new",
                reason="DRAINING",
                retry_after_s=1.0,
            )
        if self.engine_or_none is None or self.state not in (State.SERVING, State.RECOVERING):
            raise self._not_serving()
        return self.engine_or_none

    def _not_serving(self) -> Unavailable:
        return Unavailable(
            f"the cluster is {self.state.value}" + (f": {self.error}" if self.error else ""),
            reason="NOT_SERVING",
            retry_after_s=1.0,
        )

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
        return wanted_context(self.config, self.model.spec)

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
                self._set_state(State.SERVING)
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
        log.error("not recovered within %g s: requests fail", self.config.recovery_timeout_s)
        engine.fail(self._not_recovered())

    def _not_recovered(self) -> Unavailable:
        return Unavailable(
            f"the cluster has not recovered within {self.config.recovery_timeout_s:g} s: {self.error}",
            reason="NOT_RECOVERED",
            retry_after_s=GIVEN_UP_RETRY_S,
        )

    async def compute_partial(
        self, module: str, activation: np.ndarray, max_output_bytes: int
    ) -> list[Partial]:
        """Every rank's partial output of one module, all of one epoch.

        While the group recovers it waits, and asks the next one; Unavailable when that takes longer than
        `recovery_timeout_s`.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self.config.recovery_timeout_s
        while True:
            await self._until_serving(give_up)
            changed = self._changed
            try:
                return await self.group.compute_partial(module, activation, max_output_bytes)
            except ServiceError as error:
                if error.code not in _LOSSES and error.reason != STALE_EPOCH:
                    raise
                if loop.time() >= give_up:
                    raise self._not_recovered() from error
                log.warning("%s is to be computed anew: %s", module, error)
            # If a worker is lost the watch sees it within this time, or has. If not, it is asked again.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.heartbeat_timeout_s):
                    await changed.wait()

    async def _until_serving(self, give_up: float) -> None:
        """Returns while steps are run; Unavailable when they are not by `give_up`, of the loop's clock,
        or never will be."""
        try:
            async with asyncio.timeout_at(give_up):
                while self._stage is State.RECOVERING:
                    await self._changed.wait()
        except TimeoutError as error:
            raise self._not_recovered() from error
        if self._stage is not State.SERVING:
            raise self._not_serving()

    async def _form(self, timeout_s: float) -> None:
        """Joins the workers, in a new epoch, and has them loaded and ready for step 1."""
        assert self.plan is not None and self._memory is not None
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
            self._planned = [
                planned(self.plan, rank, description, self._memory)
                for rank, description in enumerate(descriptions)
            ]
            self._num_blocks, self._limits = size_cache(
                self.config, self.plan, descriptions, self._memory
            )
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
        self._memory = memory_settings(config, spec, descriptions)
        check_fits(self.plan, descriptions, self._memory)
        self._set_state(State.JOINING)
        await self._form(config.startup_timeout_s)
        assert self._limits is not None
        # Once the workers have room for so many blocks, an account of them is no risk.
        self.scheduler = Scheduler(
            BlockManager(self._num_blocks, config.block_size, prefix_caching=config.prefix_caching),
            max_batched_tokens=self._memory.limits.tokens,
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

    async def drain(self) -> None:
        """Takes no new calls from now on; returns when those that run have ended."""
        if not self._is_draining:
            self._set_state(self._stage, drains=True)
        while self._num_calls:
            self._call_ended.clear()
            await self._call_ended.wait()

    def _set_state(self, stage: State, *, drains: bool = False) -> None:
        before = self.state
        self._stage, self._is_draining = stage, self._is_draining or drains
        if self.state is not before:
            self._state_since = self._clock()
        log.info("the cluster is %s", self.state.value)
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

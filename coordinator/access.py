"""Who may call what on a coordinator, and what it says at its start of what it leaves open."""

import logging
from dataclasses import dataclass

from colrow.errors import ServiceError
from colrow.tls import is_loopback
from coordinator.api_keys import ApiKeys
from coordinator.config import CoordinatorConfig

log = logging.getLogger(__name__)

INFERENCE_PREFIX = "/colrow.v1.InferenceService/"
# Probes carry no key, and what services there are is said by any copy of the software.
OPEN_PREFIXES = ("/grpc.health.", "/grpc.reflection.")


@dataclass(frozen=True, slots=True)
class Access:
    """The keys of users and of operators; None where no key is asked for."""

    users: ApiKeys | None
    operators: ApiKeys | None

    @classmethod
    def open(cls, config: CoordinatorConfig) -> "Access | None":
        """Reads the files of keys, if there are any. InvalidArgument where one can't be used."""
        users = operators = None
        if config.api_keys:
            users = ApiKeys(config.api_keys, "api_keys")
        if config.control_api_keys:
            operators = ApiKeys(config.control_api_keys, "control_api_keys")
        return cls(users, operators) if users or operators else None

    def to_http(self, called: str, authorization: str) -> None:
        """Unauthenticated where no key of a user is shown: all of the HTTP API is theirs."""
        self._check(called, authorization, self.users)

    def to_grpc(self, method: str, authorization: str) -> None:
        """The same for a gRPC method. InferenceService is the users', the rest the operators'."""
        if method.startswith(OPEN_PREFIXES):
            return
        is_users = method.startswith(INFERENCE_PREFIX)
        self._check(method, authorization, self.users if is_users else self.operators)

    def _check(self, called: str, authorization: str, keys: ApiKeys | None) -> None:
        if keys is None:
            return
        try:
            name = keys.name_of(authorization)
        except ServiceError as error:
            log.info("call refused", extra={"called": called, "reason": error.message})
            raise
        log.debug("call", extra={"called": called, "api_key": name})


def what_is_open(config: CoordinatorConfig) -> list[str]:
    """A line for each door that stands open to other machines, with the flag that closes it."""
    lines = []
    if not is_loopback(config.host):
        if config.tls is None:
            lines.append(
                f"listens on {config.host} without TLS: prompts, answers and keys can be read on "
                "their way; --tls closes it"
            )
        if not config.client_cert_auth:
            if not config.api_keys:
                lines.append(
                    f"anyone who reaches {config.host} may use the model; --api-keys closes it"
                )
            if not config.control_api_keys:
                lines.append(
                    f"anyone who reaches {config.host} may drain the cluster; --api-keys or "
                    "--control-api-keys closes it"
                )
    far = [worker for worker in config.workers if not is_loopback(worker.rpartition(":")[0])]
    if far and config.worker_tls is None:
        lines.append(
            f"calls workers on other machines without TLS ({', '.join(far)}): prompts can be read on "
            "their way; --worker-tls closes it"
        )
    return lines

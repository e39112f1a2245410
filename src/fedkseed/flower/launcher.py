"""What starts a node's answers: in place of Flower's `flower-superexec`, for a SuperNode with `--isolation process`.

    python -m fedkseed.flower.launcher --runtime-api-address 127.0.0.1:9094 --parent-pid PID

Flower's own starts a Python process for each message. This one has imported what such a process needs, forks for each
message, and keeps a worker beside it that holds the model (`fedkseed.flower.worker`). The script that starts a node
(examples/flower/deployment/supernode.sh) starts Flower's own in its place if it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from typing import NoReturn

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

from fedkseed.flower import worker
from fedkseed.flower.worker import Worker

POLL_SECONDS = 0.2


def main() -> None:
    """Answer messages until the SuperNode is gone."""
    parser = argparse.ArgumentParser(description="Answers the messages of a SuperNode that runs with --isolation process.")
    parser.add_argument("--runtime-api-address", required=True, help="the SuperNode's --host and --port")
    parser.add_argument("--parent-pid", required=True, type=int, help="the SuperNode, with which this ends")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):  # the SuperNode is gone
        serve(arguments.runtime_api_address, arguments.parent_pid)


def serve(address: str, supernode: int) -> NoReturn:
    """Fork for one message after the other.

    Args:
        address: of the SuperNode's runtime interface, on this machine.
        supernode: its process id.
    """
    start_parent_process_monitor(supernode)
    worker.current = Worker()
    node = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    fork = multiprocessing.get_context("fork")
    while True:
        found = node.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if found.HasField("task") and found.token:
            worker.current.renew()
            fork.Process(target=run_clientapp, args=(address, found.token, True, None, os.getpid())).start()
        else:
            time.sleep(POLL_SECONDS)
        multiprocessing.active_children()  # reaps
        worker.current.look()


if __name__ == "__main__":
    main()

"""The Flower ClientApp: our bytes in, our bytes out; an error that a user can cause is one line for both sides."""

from __future__ import annotations

import logging
from collections.abc import Callable
from logging import ERROR, WARNING

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedkseed.errors import FedKSeedError
from fedkseed.flower import summing, worker
from fedkseed.flower.envelope import unwrap, wrap
from fedkseed.flower.log import log
from fedkseed.flower.roll import HELLO

WITHHELD = "its records or its model cannot be used; the node's log says why"
"""What the server is told in place of an error that may quote a record."""


def client_app() -> ClientApp:
    """A ClientApp for nodes that name themselves, their data and their model in `--node-config`, or for simulated ones."""
    app = ClientApp()
    app.query(HELLO.split(".")[1])(_answering("hello"))
    app.train()(_answering("train"))
    app.evaluate()(_answering("evaluate"))
    return app


def _answering(kind: str) -> Callable[[Message, Context], Message]:
    def respond(message: Message, context: Context) -> Message:
        try:
            data = unwrap(message)
            if kind == "train" and summing.is_on(context):
                reply = summing.kept(context, _answer("add", summing.with_kept(context, data), context))
            else:
                reply = _answer(kind, data, context)
            return Message(wrap(reply), reply_to=message)
        except FedKSeedError as error:
            log(ERROR, "fedkseed: %s", error)
            told = WITHHELD if error.private else str(error)
        except Exception as error:  # a fault of ours, whose words Flower would pass on
            logging.getLogger(__name__).exception("%s message", kind)
            told = f"{type(error).__name__}; the node's log says what went wrong"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told), reply_to=message)

    return respond


def _answer(kind: str, data: bytes, context: Context) -> bytes:
    """By the node's worker where there is one, else in this process."""
    about = context.run_id, context.run_config, context.node_config
    if worker.current is not None:
        try:
            return worker.current.ask(kind, *about, data)
        except ConnectionError as error:
            log(WARNING, "%s; this process loads everything itself", error)
    from fedkseed.flower.participant import participant_of  # torch, which a message that is handed on does without

    return participant_of(*about).answer(kind, data)

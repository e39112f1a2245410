"""The Flower ClientApp: our bytes in, our bytes out; an error that a user can cause is one line for both sides."""

from __future__ import annotations

from collections.abc import Callable
from logging import ERROR

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedkseed.errors import FedKSeedError
from fedkseed.flower.envelope import unwrap, wrap
from fedkseed.flower.log import log
from fedkseed.flower.participant import Participant
from fedkseed.flower.roll import HELLO


def client_app() -> ClientApp:
    """A ClientApp for nodes that name themselves, their data and their model in `--node-config`, or for simulated ones."""
    app = ClientApp()
    app.query(HELLO.split(".")[1])(_answering(Participant.hello))
    app.train()(_answering(Participant.train))
    app.evaluate()(_answering(Participant.evaluate))
    return app


def _answering(answer: Callable[[Participant, bytes], bytes]) -> Callable[[Message, Context], Message]:
    def respond(message: Message, context: Context) -> Message:
        try:
            participant = Participant(context.run_config, context.node_config)
            return Message(wrap(answer(participant, unwrap(message))), reply_to=message)
        except FedKSeedError as error:
            log(ERROR, "fedkseed: %s", error)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)

    return respond

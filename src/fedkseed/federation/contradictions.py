"""Settings that contradict each other: what nobody could mean, would be void, or would be taken and do nothing.

Each is a `ValueError` whose one line begins with a flag and says what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkseed.federation.aggregators import AGGREGATORS
from fedkseed.federation.algorithms import ALGORITHMS, SOME_TAKE, that_take
from fedkseed.federation.envelope import MAX_NUMBERS, MAX_STEPS
from fedkseed.federation.exact_sum import LARGEST
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.noise.families import FAMILIES, MIN_BLOCK

if TYPE_CHECKING:
    from fedkseed.federation.config import FederationConfig

MIN_COHORT, MOST_WEIGHT = 3, 0.5
"""Of a secure sum: in one of two clients each would know the other's part, and one that mostly is one client's tells of it."""
FLOAT_WIRES = ("float16", "float32")
LIKE_ALL = {"aggregator": "mean"}
"""What an algorithm that does not take a setting does all the same, so that it may be said."""


def check(config: FederationConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ValueError: the first of them.
    """
    _check_taken(config)
    _check_objective(config)
    _check_steps(config)
    _check_privacy(config)
    _check_rule(config)
    if config.facts.sends == "changes":
        _check_changes(config)
    _check_exact_sums(config)
    _check_secure_sums(config)


def _check_taken(config: FederationConfig) -> None:
    """What the algorithm does not take."""
    for name in sorted(SOME_TAKE):
        field = type(config).model_fields.get(name)
        if (
            field is not None
            and not config.facts.takes(name)
            and getattr(config, name) not in (field.default, LIKE_ALL.get(name))
        ):
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(config, name)!r} and --algorithm {config.algorithm} does not take it; "
                f"leave it out, or choose one of {', '.join(_takers(config, name))}"
            )


def _takers(config: FederationConfig, setting: str) -> list[str]:
    """The algorithms that take a setting as it is here: of a coded wire those whose clients send changes."""
    coded = setting == "wire" and config.wire not in FLOAT_WIRES
    return [name for name in that_take(setting) if not coded or ALGORITHMS[name].sends == "changes"]


def _check_objective(config: FederationConfig) -> None:
    """What the objective has no use for, or is not to be had for it."""
    goal = config.goal
    if config.facts.measures == "gradient" and not goal.smooth:
        raise ValueError(
            f"--objective {config.objective} has no gradient, which --algorithm {config.algorithm} needs; take fedkseed"
        )
    for name, has in (
        ("scaling", not goal.smooth),
        ("temperature", goal.answers),
        ("max_new_tokens", goal.answers),
        ("dpo_beta", goal.smooth and goal.pairs),
    ):
        if not has and getattr(config, name) != type(config).model_fields[name].default:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(config, name)!r} and --objective {config.objective} has no use for "
                "it; leave it out"
            )

    if config.compile == "on" and goal.answers:
        raise ValueError(
            f"--compile is on and --objective {config.objective} wants answers, which grow token by token; leave it out"
        )


def _check_steps(config: FederationConfig) -> None:
    """More seeds than a request holds."""
    if config.local_steps * config.directions > MAX_STEPS:
        raise ValueError(
            f"--local-steps {config.local_steps} of --directions {config.directions} are "
            f"{config.local_steps * config.directions} seeds; a request holds {MAX_STEPS}, so lower one of them"
        )


def _check_rule(config: FederationConfig) -> None:
    """A rule or a wire that is not for what clients send."""
    if config.facts.sends == "scalars" and config.rule.same_seeds and not config.same_seeds:
        raise ValueError(
            f"--aggregator {config.aggregator} compares what clients measure along the same seeds, and each steps along its "
            "own; give --shared-seeds on, or take clipped or mean"
        )
    if config.facts.sends != "changes" and config.wire not in FLOAT_WIRES:
        raise ValueError(
            f"--wire is {config.wire!r} and --algorithm {config.algorithm} sends float16 or float32; take one of them"
        )


def _check_changes(config: FederationConfig) -> None:
    """Of changes of K numbers: pages, optimisers, bases, and who takes part."""
    pages = -(-config.num_rounds // config.rounds_per_page) if config.rounds_per_page else 1
    if pages * config.num_seeds > MAX_NUMBERS:
        raise ValueError(
            f"--rounds-per-page {config.rounds_per_page} in --num-rounds {config.num_rounds} are {pages:,} pages of "
            f"{config.num_seeds:,} numbers; a ledger has at most {MAX_NUMBERS:,}, so raise --rounds-per-page, or lower "
            "--num-seeds"
        )
    if OPTIMIZERS[config.server_optimizer].bounded and "server_lr" not in config.model_fields_set:
        raise ValueError(
            f"--server-optimizer is {config.server_optimizer} and --server-lr is missing; it is how far a number moves in a "
            "round, so give about what --local-optimizer adam would have as --lr, such as 1e-3"
        )
    if config.two_point_clients == 1 and config.checkpointing == "on":
        raise ValueError(
            "--checkpointing is on and --two-point-clients 1, so that nobody backpropagates; leave one of them out"
        )
    power_of_two = config.num_seeds >= MIN_BLOCK and config.num_seeds & (config.num_seeds - 1) == 0
    if config.basis == "table" and not (FAMILIES[config.noise].has_table and power_of_two):
        raise ValueError(
            f"--basis table needs --noise hadamard and --num-seeds a power of two from {MIN_BLOCK} on, they are "
            f"{config.noise} and {config.num_seeds}; change them, or take --basis coefficients"
        )
    if config.two_point_clients and config.local_optimizer != "sgd":
        raise ValueError(
            f"--two-point-clients is {config.two_point_clients} and --local-optimizer {config.local_optimizer}; scalars can be "
            "weighed against changes of sgd only, so take that and let --server-optimizer bound the steps"
        )


def _check_privacy(config: FederationConfig) -> None:
    """What would void the guarantee, or not be what it looks like."""
    if config.dp is None:
        for name in ("clip_norm", "noise_multiplier", "epsilon", "delta"):
            if (value := getattr(config, name)) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is {value:g} and there is no --dp; leave it out, or give --dp")
        return
    if config.clip_norm is None:
        raise ValueError(f"--dp is {config.dp} and --clip-norm is missing; give the longest vector of one {config.dp}")
    if config.noise_multiplier is None and config.epsilon is None:
        raise ValueError(f"--dp is {config.dp} and there is no noise; give --epsilon, which finds it, or --noise-multiplier")
    if config.weighting != "equal":
        raise ValueError(
            f"--dp is {config.dp} and --weighting {config.weighting}, which tells how many records each client has; take equal"
        )
    if config.dp == "client" and config.facts.draws == "importance":
        raise ValueError(
            f"--dp is client and --algorithm {config.algorithm} draws seeds by what single clients sent; take fedkseed"
        )
    if config.dp == "client" and AGGREGATORS[config.aggregator].weigh is None:
        raise ValueError(
            f"--dp is client and --aggregator {config.aggregator}; what one client moves is not bounded then, so leave it out"
        )
    if config.dp == "client" and config.secure_sums == "on":
        raise ValueError("--dp is client and --secure-sums on; a server that sees no single reply can clip none; leave one out")
    if config.dp == "record":
        if config.facts.sends == "tensors":
            raise ValueError(
                f"--dp is record and --algorithm {config.algorithm} sends tensors, of which single records are not known; "
                "take --dp client, or an algorithm of K numbers"
            )
        if not config.goal.smooth and config.scaling != "none":
            raise ValueError(
                f"--dp is record and --scaling {config.scaling}, which compares the scores of records; take --scaling none"
            )
        if config.local_unit == "epochs":
            raise ValueError("--dp is record and --local-unit epochs, which tells the number of records; count steps")
        if config.loss_clip is not None:
            raise ValueError(
                f"--dp is record and --loss-clip {config.loss_clip:g}, by which a record decides whether a step is dropped; "
                "leave it out: --clip-norm bounds it"
            )


def _check_exact_sums(config: FederationConfig) -> None:
    """What cannot be summed exactly."""
    if config.summation == "ordered":
        return
    if config.rule.weigh is None:
        raise ValueError(
            f"--summation is exact and --aggregator {config.aggregator}, which is no sum, so that "
            "edges cannot sum it either; take clipped or mean"
        )
    if config.secure_sums == "on" or config.dp == "client":
        other = "--secure-sums on" if config.secure_sums == "on" else "--dp client"
        raise ValueError(
            f"--summation is exact and {other}, whose sums are another kind of exact; leave out --summation, and --edges, "
            "which needs it"
        )
    if config.facts.sends == "changes" and config.max_value > LARGEST:
        raise ValueError(
            f"--summation is exact and --max-value {config.max_value:g}; it adds up numbers to {LARGEST:g}, so take no more"
        )


def _check_secure_sums(config: FederationConfig) -> None:
    """What a server that sees no single reply cannot do."""
    if config.secure_sums == "off":
        if config.secure_clip != type(config).model_fields["secure_clip"].default:
            raise ValueError(f"--secure-clip is {config.secure_clip:g} and --secure-sums is off; leave it out, or turn them on")
        return
    if config.rule.needs_each_reply:
        raise ValueError(
            f"--secure-sums is on and --aggregator {config.aggregator}; a rule must see each reply, which a sum hides; take "
            "--aggregator mean, or leave out --secure-sums"
        )
    if config.two_point_clients:
        raise ValueError(
            f"--secure-sums is on and --two-point-clients {config.two_point_clients}; scalars and changes are weighed "
            "against each other one by one, which nobody can in a sum, so leave out one of the two"
        )
    if config.local_unit != "steps":
        raise ValueError(
            f"--secure-sums is on and --local-unit {config.local_unit}; whoever takes more steps than the others would be "
            "alone with them, so take steps"
        )
    if config.max_share is not None and config.max_share > MOST_WEIGHT:
        raise ValueError(
            f"--secure-sums is on and --max-share {config.max_share}; a sum that mostly is one client's tells of it, so take "
            f"at most {MOST_WEIGHT}"
        )

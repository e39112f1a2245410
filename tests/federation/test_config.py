"""What the server decides and the limits of a reply: ranges, defaults, nothing unknown."""

import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from fedkseed.errors import RunError
from fedkseed.federation import FederationConfig
from fedkseed.federation.cohort import count_steps

BAD_SETTINGS: list[tuple[str, list[Any]]] = [
    ("algorithm", ["nosuch", "", None]),
    ("num_rounds", [0, -1, 1.5, "many"]),
    ("fraction_train", [0, -0.1, 1.0001, math.nan, math.inf]),
    ("local_steps", [0, 65536]),
    ("batch_size", [0, 65536]),
    ("lr", [0, -1e-6, math.nan, math.inf, None]),
    ("schedule", ["step"]),
    ("eps", [0, -1e-3, math.nan, math.inf]),
    ("directions", [0, 1025, 1.5]),
    ("objective", ["accuracy", "", "a b:c", ":score", "module:", None]),
    ("scaling", ["sign"]),
    ("temperature", [-0.1, math.nan, 11]),
    ("max_new_tokens", [0, 1.5]),
    ("max_moved", [0, -1, math.inf]),
    ("num_seeds", [0, 65537]),
    ("noise", ["uniform"]),
    ("weighting", ["size"]),
    ("loss_clip", [0, -1, math.nan]),
    ("min_replies", [0]),
    ("wire", ["float64", "bfloat16"]),
    ("seed", [-1, 2**63]),
    ("learning_rate", [0.1]),  # no such setting
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_SETTINGS for value in values], ids=str)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        FederationConfig(**{"lr": 0.5, name: value})
    assert [error["loc"] for error in caught.value.errors()] == [(name,)]


def test_settings_are_frozen_and_lr_has_no_default() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FederationConfig(lr=0.5).lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="lr"):
        FederationConfig()


@pytest.mark.parametrize(
    "changes",
    [{"max_grad": 0}, {"max_grad": 60001}, {"max_grad": math.nan}, {"max_examples": 0}, {"max_share": 1.1}],
)
def test_limits_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FederationConfig(lr=1, **changes)


def test_defaults_are_the_published_codes() -> None:
    defaults = FederationConfig(lr=3e-7)
    assert (defaults.eps, defaults.local_steps, defaults.fraction_train, defaults.batch_size) == (5e-4, 200, 0.05, 1)
    assert (defaults.num_seeds, defaults.num_rounds, defaults.weighting) == (4096, 40, "examples")


def test_the_largest_gradient_fits_every_precision_of_the_wire() -> None:
    assert FederationConfig(lr=1, max_grad=60000).max_grad == 60000  # float16 ends at 65504
    with pytest.raises(ValueError, match="60000"):
        FederationConfig(lr=1, max_grad=65504)


def test_configs_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="momentum"):
        FederationConfig(lr=1, momentum=0.9)  # type: ignore[call-arg]


def test_what_a_step_costs_and_how_many_seeds_a_request_holds() -> None:
    costs = {("fedkseed", 1): 2, ("fedkseed", 8): 9, ("fedkseed-pro", 2): 3, ("fedkseed-grad", 1): 3, ("fedavg", 1): 3}
    for (algorithm, directions), passes in costs.items():
        assert FederationConfig(lr=0.1, algorithm=algorithm, directions=directions).passes_per_step == passes
    assert FederationConfig(lr=0.1, local_steps=65535 // 8, directions=8).directions == 8
    with pytest.raises(ValidationError, match="--local-steps 8192 of --directions 8 are 65536 seeds; a request holds 65535"):
        FederationConfig(lr=0.1, local_steps=8192, directions=8)
    epochs = FederationConfig(lr=0.1, local_steps=1, local_unit="epochs", directions=8)
    assert count_steps(epochs, 8191, "a") == 8191
    with pytest.raises(RunError, match="1 epochs of client 'a' are 8192 steps; expected 1 to 8191"):
        count_steps(epochs, 8192, "a")


@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-pro"])
@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "krum"])
def test_rules_that_compare_seeds_want_shared_ones(algorithm: str, rule: str) -> None:
    """One line, with what to do; gradients need none, and shared seeds may do without such a rule."""
    text = f"--aggregator {rule} compares .* along the same seeds, .*; give --shared-seeds on, or take clipped or mean"
    with pytest.raises(ValidationError, match=text):
        FederationConfig(lr=1, algorithm=algorithm, aggregator=rule)
    assert FederationConfig(lr=1, algorithm=algorithm, aggregator=rule, shared_seeds="on").rule.name == rule
    assert FederationConfig(lr=1, algorithm="fedkseed-grad", aggregator=rule).rule.name == rule
    assert FederationConfig(lr=1, algorithm=algorithm, shared_seeds="on").rule.name == "clipped"


def test_a_baseline_is_a_mean_and_no_other_rule() -> None:
    for said in ({}, {"aggregator": "mean"}):
        assert FederationConfig(lr=1, algorithm="fedavg", **said).rule.name == "mean"
    with pytest.raises(ValidationError, match="--aggregator is 'median' and --algorithm fedavg does not take it"):
        FederationConfig(lr=1, algorithm="fedavg", aggregator="median")
    with pytest.raises(ValidationError, match="--shared-seeds is 'on' and --algorithm fedkseed-grad does not take it"):
        FederationConfig(lr=1, algorithm="fedkseed-grad", shared_seeds="on")


def test_a_secure_sum_is_a_mean_and_no_other_rule() -> None:
    """By default, and what cannot be is refused: of a sum nobody sees the replies."""
    assert (
        FederationConfig(lr=1, secure_sums="on").rule.name
        == FederationConfig(lr=1, secure_sums="on", aggregator="mean").rule.name
    )
    assert FederationConfig(lr=1, secure_sums="on").rule.name == "mean"
    with pytest.raises(ValidationError, match="--secure-sums is on and --aggregator clipped; a rule must see each reply"):
        FederationConfig(lr=1, secure_sums="on", aggregator="clipped")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "ranks"}, "--scaling is 'ranks' and --objective loss has no use for it; leave it out"),
        ({"objective": "dpo", "temperature": 0.5}, "--temperature is 0.5 and --objective dpo has no use for it"),
        ({"objective": "exact-match", "dpo_beta": 0.5}, "--dpo-beta is 0.5 and --objective exact-match has no use for it"),
        (
            {"objective": "rouge-l", "algorithm": "fedkseed-grad"},
            "--objective rouge-l has no gradient, which --algorithm fedkseed-grad needs; take fedkseed",
        ),
        ({"objective": "dpo", "algorithm": "fedavg"}, "--objective is 'dpo' and --algorithm fedavg does not take it"),
        ({"max_moved": 0.1, "algorithm": "fedkseed-grad"}, "--max-moved is 0.1 and --algorithm fedkseed-grad does not take it"),
    ],
    ids=str,
)
def test_what_an_objective_has_no_use_for_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FederationConfig(lr=1, **changes)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 2),
        ({"directions": 8}, 9),
        ({"objective": "exact-match"}, 2),
        ({"objective": "module:score", "directions": 8}, 16),
        ({"objective": "dpo"}, 4),
        ({"objective": "dpo-sign", "directions": 8}, 32),
        ({"objective": "dpo", "algorithm": "fedkseed-grad"}, 6),
        ({"algorithm": "fedkseed-grad", "two_point_clients": 0.25}, 2.75),
        ({"algorithm": "fedkseed-grad", "two_point_clients": 1}, 2),
    ],
    ids=str,
)
def test_a_step_costs_what_its_probes_do(changes: dict[str, Any], passes: float) -> None:
    """In passes of a record; an answer is one, a pair two."""
    assert FederationConfig(lr=1, **changes).passes_per_step == passes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secure_clip": 5.0}, "--secure-clip is 5 and --secure-sums is off; leave it out"),
        (
            {"algorithm": "fedkseed-grad", "two_point_clients": 1, "checkpointing": "on"},
            "--checkpointing is on and --two-point-clients 1, so that nobody backpropagates",
        ),
    ],
    ids=str,
)
def test_what_would_be_taken_and_do_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FederationConfig(lr=1, **changes)

"""The algorithms that FedKSeed is compared with: clients send back tensors, the server averages them.

FedAvg (McMahan et al., 2017) over all parameters; FedIT (Zhang et al., 2024) over LoRA adapters; FedPrompt and FedPTuning
(Kuang et al., FederatedScope-LLM, 2024) over soft prompts; FedZO (Fang et al., 2022), zeroth-order over all parameters; Ferret
(Shu et al., 2025) over all parameters, of which coordinates are sent.
"""

from fedkseed.baselines.attach import adapter, attach, fresh_lora, require_peft, restore
from fedkseed.baselines.checkpoint import TunedTensors
from fedkseed.baselines.client import TensorClient
from fedkseed.baselines.parameters import Parameters, fingerprint
from fedkseed.baselines.projected import parameters_of
from fedkseed.baselines.server import TensorServer

__all__ = [
    "Parameters",
    "TensorClient",
    "TensorServer",
    "TunedTensors",
    "adapter",
    "attach",
    "fingerprint",
    "fresh_lora",
    "parameters_of",
    "require_peft",
    "restore",
]

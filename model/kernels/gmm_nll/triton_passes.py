"""The two elementwise passes by Triton: what `one_pass.run` calls on a GPU."""

from torch import Tensor

from model.kernels.gmm_nll.one_pass import Responsibility
from model.kernels.gmm_nll.triton_kernels import launch_gradient, launch_log_joint


class TritonPasses:
    """See `one_pass.Passes`."""

    def bytes_per_component(self, component_bias: Tensor) -> int:
        """The head's own outputs; everything else of a token is smaller by a factor of d."""
        return 2 * component_bias.shape[2] * component_bias.element_size()

    def log_joint(self, raw: Tensor, logits: Tensor, soft: Tensor) -> tuple[Tensor, None]:
        """logit_k + log N_k(soft)."""
        return launch_log_joint(raw, logits, soft.contiguous()), None

    def gradients(self, raw: Tensor, kept: None, soft: Tensor, responsibility: Responsibility) -> tuple[Tensor, Tensor]:
        """Overwrites raw with its gradient; returns those of soft and of the bias."""
        joint, weight = responsibility.joint.contiguous(), responsibility.weight.contiguous()
        return launch_gradient(raw, responsibility.log_joint, joint, weight, soft.contiguous())

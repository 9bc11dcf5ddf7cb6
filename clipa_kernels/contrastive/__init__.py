"""The two losses of image-text pairs, and open_clip's modules of them."""

from .api import contrastive_loss, contrastive_loss_reference, sigmoid_loss, sigmoid_loss_reference
from .modules import ClipLoss, SigLipLoss

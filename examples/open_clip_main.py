"""open_clip's own training program with this library inside: its flags, its loop, its checkpoints.

    pip install "open_clip_torch[training]" clipa-kernels
    python examples/open_clip_main.py --model ViT-B-16 --force-patch-dropout 0.5 \\
        --train-data "shards/{0000..0999}.tar" --dataset-type webdataset --precision amp_bf16

Two names that open_clip_train.main calls are other functions here: the one that builds the model,
and the one that builds the loss. Checkpoints stay open_clip's.
"""

import sys

import open_clip_train.main as program

from clipa_kernels import ClipLoss, SigLipLoss, accelerate

build, loss_of = program.create_model_and_transforms, program.create_loss


def build_accelerated(*args, **kwargs):
    """open_clip's model and transforms, the model accelerated."""
    model, *transforms = build(*args, **kwargs)
    _, report = accelerate(model)
    print(report)
    return model, *transforms


def create_loss(args):
    """The contrastive losses without an N x N matrix; CoCa's and distillation's are open_clip's."""
    if args.distill or "coca" in args.model.lower():
        return loss_of(args)
    if args.siglip:
        return SigLipLoss(rank=args.rank, world_size=args.world_size)
    return ClipLoss(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        rank=args.rank,
        world_size=args.world_size,
    )


if __name__ == "__main__":
    program.create_model_and_transforms, program.create_loss = build_accelerated, create_loss
    program.main(sys.argv[1:])

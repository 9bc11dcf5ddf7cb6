"""Fine-tune a timm ViT with few patches, then briefly with all of them.

    python examples/timm_fine_tune.py --model vit_base_patch16_224 --pretrained --steps 200

Pictures are drawn here, two tints of noise. Yours take their place.
"""

import argparse

import timm
import torch
import torch.nn.functional as F

from clipa_kernels import accelerate


def draw(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, reddish (class 0) or greenish (class 1)."""
    images, classes = torch.randn(batch, 3, size, size), torch.randint(2, (batch,))
    images[torch.arange(batch), classes] += 0.5
    return images, classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--drop", type=float, default=0.5, help="share of patches dropped at first")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    options = dict(img_size=args.size, num_classes=2, patch_drop_rate=args.drop)
    model = timm.create_model(args.model, pretrained=args.pretrained, **options)
    model, report = accelerate(model)
    print(report)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    for step in range(args.steps):
        if step == args.steps * 4 // 5:
            model.patch_drop.prob = 0.0
        images, classes = draw(args.batch, args.size)
        loss = F.cross_entropy(model.train()(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, classes = draw(256, args.size)
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == classes).float().mean()
    print(f"loss {loss:.3f}, {100 * right:.0f}% of 256 pictures right")


if __name__ == "__main__":
    main()

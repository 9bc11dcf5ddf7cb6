"""A training step of Hugging Face's CLIP: half of the patches, a large batch in small parts.

    python examples/hugging_face_clip.py --model openai/clip-vit-base-patch16 --batch 256 --parts 8

--model is a name or a folder of from_pretrained; without it, a small model of random weights.
"""

import argparse

import torch
from transformers import CLIPConfig, CLIPModel

from clipa_kernels import accelerate, accumulated, contrastive_loss


def small() -> CLIPModel:
    both = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=100, max_position_embeddings=16, eos_token_id=99, bos_token_id=98)
    image = dict(image_size=64, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=both | text, vision_config=both | image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = CLIPModel.from_pretrained(args.model) if args.model else small()
    model, report = accelerate(model.train(), drop=0.5)
    print(report)
    side, text = model.config.vision_config.image_size, model.config.text_config
    images = torch.randn(args.batch, 3, side, side)
    ids = torch.randint(1, text.vocab_size - 2, (args.batch, text.max_position_embeddings))
    ids[:, -1] = text.eos_token_id
    parts = list(zip(images.chunk(args.parts), ids.chunk(args.parts), strict=True))

    def encode(images: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        out = model(pixel_values=images, input_ids=ids)
        return dict(image=out.image_embeds, text=out.text_embeds, scale=model.logit_scale.exp())

    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for step in range(args.steps):
        _, loss = accumulated(encode, parts, lambda out: contrastive_loss(*out.values()))
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()

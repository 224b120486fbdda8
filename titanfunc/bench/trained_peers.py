"""What a row of a peer trains: titans-pytorch's model eagerly, or a torch transformer compiled; AdamW by torch.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from titanfunc.bench import peers, roofline
from titanfunc.bench.step_row import StepRow, sizes_of, titans_of
from titanfunc.bench.torch_transformer import Decoder
from titanfunc.bench.trained import How, Trained

CLIP = 1.0  # of the gradients' norm, as our rows have it


def torch_transformer(row: StepRow, how: How) -> Trained:
    """torch_transformer.py's decoder: loss and gradients compiled, the fused AdamW beside them."""
    config = sizes_of(row)
    torch.manual_seed(0)
    model = Decoder(config).to(how.device)
    loss = model.loss
    if how.backend is not None:
        loss = torch.compile(loss, fullgraph=True, dynamic=False, backend=how.backend)
    params = list(model.parameters())
    count, embedded = sum(p.numel() for p in params), model.embedding.weight.numel()
    work = roofline.Work(
        6.0 * (count - (0 if config.tie_embeddings else embedded)) * row.batch * row.seq_len,
        12.0 * roofline.pairs(config, row.seq_len) * config.dim * config.layers * row.batch,
        7 * sum(p.nbytes for p in params),
    )
    return Trained(by_adamw(model, loss, how), count, config.precision, config.vocab_size, work)


def titans_pytorch_mac(row: StepRow, how: How) -> Trained:
    """titans-pytorch's MemoryAsContextTransformer under bfloat16's autocast. Eager: it does not compile.

    Raises ModuleNotFoundError where it is not installed.
    """
    sizes = titans_of(row)
    module = importlib.import_module(peers.PACKAGE)
    torch.manual_seed(0)
    model = module.MemoryAsContextTransformer(
        num_tokens=sizes.num_tokens, dim=sizes.dim, depth=sizes.depth, segment_len=sizes.segment_len,
        heads=sizes.heads, dim_head=sizes.dim_head, neural_memory_layers=sizes.memory_layers,
    ).to(how.device)  # fmt: skip

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast(how.device.type, torch.bfloat16):
            found: Tensor = model(tokens, return_loss=True)
        return found

    count = sum(p.numel() for p in model.parameters())
    work = roofline.Work(6.0 * (count - sizes.num_tokens * sizes.dim) * row.batch * row.seq_len, 0.0, 7 * 4 * count)
    return Trained(by_adamw(model, loss, how), count, "bf16", sizes.num_tokens, work)


def by_adamw(model: nn.Module, loss: Callable[[Tensor], Tensor], how: How) -> Callable[[Tensor], Tensor]:
    """A step on tokens int64 [B, T + 1] -> the loss, 0-d, as a torch user writes it; the gradients do not stay."""
    params = [p for p in model.parameters() if p.requires_grad]
    fused = how.device.type == "cuda"
    optimizer = torch.optim.AdamW(params, lr=how.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)

    def step(tokens: Tensor) -> Tensor:
        value = loss(tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step

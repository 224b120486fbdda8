"""A train step of your own, in plain Python: sign-of-momentum updates on a MAC model, one compiled graph."""

import torch

import titanfunc as tf

config = tf.models.preset("mac_tiny", vocab_size=256, dim=64, layers=2, heads=2, ff=128)
model = tf.models.build(config)
params = model.init(torch.Generator().manual_seed(0))
momentum = tf.tree.zeros_like(params)


def loss_fn(params, tokens):
    memory = model.init_memory(params, tokens.shape[0])  # fresh memories; gradients reach their first weights
    logits, memory = model.apply(params, memory, tokens[:, :-1], aligned=True)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train_step(state, batch):
    params, momentum = state
    grads, loss = torch.func.grad_and_value(loss_fn)(params, batch["tokens"])
    momentum = tf.tree.map(lambda m, g: 0.9 * m + 0.1 * g, momentum, grads)
    params = tf.tree.map(lambda p, m: p - 3e-3 * torch.sign(m), params, momentum)
    return (params, momentum), {"loss": loss, "grad_norm": tf.tree.global_norm(grads)}


def main(steps=30, backend="inductor"):
    step = tf.train.compile_step(train_step, backend)
    state, losses = (params, momentum), []
    text = torch.frombuffer(bytearray(b"the memory goes on learning while it reads. " * 200), dtype=torch.uint8).long()
    for i in range(steps):
        tokens = torch.stack([text[i * 7 + j * 44 :][:129] for j in range(8)])
        state, metrics = step(state, {"tokens": tokens})
        losses.append(metrics["loss"])
    print(f"loss {losses[0].item():.2f} -> {losses[-1].item():.2f} nats a byte")
    return torch.stack(losses)


if __name__ == "__main__":
    main()

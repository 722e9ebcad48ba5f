#!/usr/bin/env python3
"""PyTorch's side of dev/gpu_check.sh, on the same GPU: attention by its flash and cuDNN backends at the shapes of
dev/bench/attention.cpp, the byte-moving kernels, and steps of GPT-2 124M, compiled.

    python3 dev/bench/gpu_torch.py [attention|quick|bytes|step ...]      quick: attention at three lengths
"""

import math
import pathlib
import sys

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    print(f"{pathlib.Path(__file__).name}: error: the Python package {error.name} is missing; install what it needs with: "
          "pip install -r dev/requirements-golden.txt", file=sys.stderr)
    sys.exit(2)

DEVICE, DTYPE = "cuda", torch.bfloat16


def milliseconds(call, seconds=0.3):
    """Median of single calls between events, after a warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times, spent = [], 0.0
    while len(times) < 5 or spent < seconds * 1e3:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
        spent += times[-1]
    return sorted(times)[len(times) // 2]


def attention(lengths=(2048, 4096, 8192, 16384)):
    print(f"{'attention':<34} {'backend':<8} {'forward ms':>10} {'TFLOP/s':>8} {'backward ms':>11} {'TFLOP/s':>8}")
    for D in (64, 128):
        for T in lengths:
            B, H = max(16384 // T, 1), (2048 if T <= 16384 else 256) // D
            shape = f"B={B} T={T} H={H} D={D}"
            q, k, v = (torch.randn(B, H, T, D, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3))
            dout = torch.randn(B, H, T, D, device=DEVICE, dtype=DTYPE)
            flops = 4 * B * H * T * T * D / 2
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                with sdpa_kernel(backend):
                    try:
                        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                        with torch.no_grad():
                            forward = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
                        backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
                    except RuntimeError as error:
                        print(f"{shape:<34} {name:<8} {str(error).splitlines()[0]}")
                        continue
                print(f"{shape:<34} {name:<8} {forward:>10.3f} {flops / forward / 1e9:>8.0f} {backward:>11.3f} "
                      f"{2.5 * flops / backward / 1e9:>8.0f}")


def bytes_moved():
    print(f"{'bytes':<34} {'ms':>10} {'GB/s':>8}")

    def line(name, moved, call):
        ms = milliseconds(call)
        print(f"{name:<34} {ms:>10.4f} {moved / ms / 1e6:>8.0f}")

    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    line("device copy, 1 GiB", 2 << 30, lambda: target.copy_(source))
    N, C = 65536, 768
    x, w, b = torch.randn(N, C, device=DEVICE, dtype=DTYPE), *(torch.randn(C, device=DEVICE, dtype=DTYPE) for _ in "wb")
    line(f"layer_norm {N}x{C}", 4 * N * C, lambda: F.layer_norm(x, (C,), w, b))
    wide = torch.randn(16384, 3072, device=DEVICE, dtype=DTYPE)
    line("gelu tanh 16384x3072", 4 * wide.numel(), lambda: F.gelu(wide, approximate="tanh"))
    line("gelu erf 16384x3072", 4 * wide.numel(), lambda: F.gelu(wide))
    a, c = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    ms = milliseconds(lambda: a @ c)
    print(f"{'matmul 8192x8192x8192':<34} {ms:>10.4f} {2 * 8192**3 / ms / 1e9:>8.0f} TFLOP/s")


class Block(torch.nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.H = H
        self.ln1, self.ln2 = torch.nn.LayerNorm(C), torch.nn.LayerNorm(C)
        self.qkv, self.out = torch.nn.Linear(C, 3 * C), torch.nn.Linear(C, C)
        self.fc, self.proj = torch.nn.Linear(C, 4 * C), torch.nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.H, C // self.H).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.out(y)
        return x + self.proj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class Gpt2(torch.nn.Module):
    def __init__(self, T, V=50304, C=768, H=12, L=12):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(V, C), torch.nn.Embedding(T, C)
        self.blocks = torch.nn.ModuleList(Block(C, H) for _ in range(L))
        self.lnf = torch.nn.LayerNorm(C)
        for p in self.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.lnf(x) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def step():
    for B, T in ((32, 1024), (4, 8192)):
        model = Gpt2(T).to(DEVICE)
        compiled = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens, targets = (torch.randint(50257, (B, T), device=DEVICE) for _ in range(2))

        def one():
            with torch.autocast(DEVICE, DTYPE):
                loss = compiled(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        loss = float(one())
        assert abs(loss - math.log(50304)) < 1, loss
        ms = milliseconds(one, 3)
        print(f"compiled GPT-2 124M step, B={B} T={T}: {ms:.1f} ms, {B * T / ms * 1e3:.0f} tokens/s")


if __name__ == "__main__":
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    chosen = sys.argv[1:] or ["bytes", "attention", "step"]
    for part in chosen:
        {"attention": attention, "quick": lambda: attention((2048, 16384, 131072)), "bytes": bytes_moved, "step": step}[part]()
        sys.stdout.flush()

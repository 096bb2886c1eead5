"""PyTorch's times for the shapes of `fairway bench ops`, measured as that does: back to back, medians of 7 samples of some 20 ms."""
import torch, time
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
dev, bf = "cuda", torch.bfloat16
print(torch.cuda.get_device_name(), torch.__version__)


def median_ms(work):
    def sample(n):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1000 / n
    sample(3)
    n = min(200, max(1, int(20 / max(sample(1), 1e-3))))
    return sorted(sample(n) for _ in range(7))[3]


def row(what, ms, operations):
    print(f"{what:55} {ms:8.4f} ms {operations / ms / 1e9:7.0f} TFLOP/s", flush=True)


n = 65536
for k, m in [(512, 512), (512, 1024), (512, 2048), (1024, 512), (2048, 512)]:
    a, b = torch.randn(n, k, device=dev, dtype=bf), torch.randn(k, m, device=dev, dtype=bf)
    row(f"matmul [{n}, {k}] [{k}, {m}]", median_ms(lambda: a @ b), 2 * n * k * m)
    w = torch.randn(m, k, device=dev, dtype=bf)
    row(f"linear [{n}, {k}] [{m}, {k}]^T", median_ms(lambda: F.linear(a, w)), 2 * n * k * m)
for k, m in [(512, 512), (512, 2048), (2048, 512)]:
    a, b = torch.randn(n, k, device=dev, dtype=bf), torch.randn(n, m, device=dev, dtype=bf)
    row(f"matmul [{n}, {k}]^T [{n}, {m}]", median_ms(lambda: a.T @ b), 2 * n * k * m)
for B, T, H, G, D in [(64, 1024, 8, 4, 64), (16, 4096, 8, 4, 64), (16, 4096, 4, 2, 128)]:
    q = torch.randn(B, H, T, D, device=dev, dtype=bf, requires_grad=True)
    k = torch.randn(B, G, T, D, device=dev, dtype=bf, requires_grad=True)
    v = torch.randn(B, G, T, D, device=dev, dtype=bf, requires_grad=True)
    grad = torch.randn(B, H, T, D, device=dev, dtype=bf)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        f = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        operations = 2.0 * B * H * D * T * (T + 1) / 2
        forward = median_ms(f)
        row(f"cuDNN attention forward [{B}, {T}, {H}/{G}, {D}]", forward, 2 * operations)
        both = median_ms(lambda: f().backward(grad))
        row(f"cuDNN attention forward and backward [{B}, {T}, {H}/{G}, {D}]", both, 7 * operations)

"""The progress line has what an operator looks for, and of experts whether they share the load."""

from muomni.observe.progress import Progress

METRICS = {
    "loss": 2.5, "lr": 1e-3, "grad_norm": 0.75, "tokens_per_s": 1234.0, "data_wait_fraction": 0.02,
}  # fmt: skip


def test_a_dense_model_has_no_word_of_experts() -> None:
    line = Progress("thinker", "tokens", 0, 20).line(10, METRICS)
    assert line.startswith("thinker 10/20  loss 2.5000  lr 1.00e-03  grad 0.75  1,234 tokens/s")
    assert "experts" not in line


def test_health_of_the_experts_stands_in_the_line() -> None:
    health = {"moe/max_load": 1.84, "moe/entropy": 0.913, "moe/num_dead": 2.0}
    line = Progress("thinker", "tokens", 0, 20).line(10, METRICS | health)
    assert "grad 0.75  experts max 1.8x entropy 0.91 dead 2  1,234 tokens/s" in line

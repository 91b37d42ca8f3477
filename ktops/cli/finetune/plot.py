"""Draws loss.png."""

from pathlib import Path


def plot_loss(metrics: dict, path: Path) -> None:
    """Plots the training loss per step with a running mean, and any held-out loss before and after. Any
    pretraining is plotted on the left.

    Args:
        metrics: the contents of metrics.json.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("fine-tuning", metrics["steps"])]
    if metrics.get("pretraining"):
        panels.insert(0, ("pretraining", metrics["pretraining"]["steps"]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (title, log) in zip(axes[0], panels, strict=True):
        steps, losses = [entry["step"] for entry in log], [entry["loss"] for entry in log]
        axis.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1)
        axis.plot(steps, running_mean(losses), color="tab:blue", label="training")
        axis.set(title=title, xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
        axis.grid(alpha=0.3)
    steps = [entry["step"] for entry in metrics["steps"]]
    held_out = metrics["held_out"]
    if held_out["before"] is not None:
        axes[0][-1].plot(
            [0, steps[-1]],
            [held_out["before"]["loss"], held_out["after"]["loss"]],
            "o--",
            color="tab:orange",
            label="held-out, before and after",
        )
    for axis in axes[0]:
        axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    """Returns the exponential running mean with bias correction (as in Adam)."""
    means, total = [], 0.0
    for i, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        means.append(total / (1 - weight**i))
    return means

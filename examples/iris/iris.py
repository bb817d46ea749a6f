"""Trains a classifier of iris flowers, and saves it to a file."""

import os
from pathlib import Path

import joblib
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split


class Task:
    def __call__(self, config):
        flowers, species = load_iris(return_X_y=True)
        train_x, test_x, train_y, test_y = train_test_split(
            flowers, species, test_size=0.3, random_state=7
        )
        print(f"training on {len(train_x)} flowers with C={config['C']}", flush=True)
        model = LogisticRegression(C=config["C"], max_iter=1000).fit(train_x, train_y)

        accuracy = float(model.score(test_x, test_y))
        path = Path(os.environ.get("CORTEX_JOB_DIR", ".")) / "model.joblib"
        joblib.dump(model, path)
        print(f"accuracy {accuracy:.3f}, model in {path}", flush=True)
        return {"accuracy": accuracy, "model": str(path)}

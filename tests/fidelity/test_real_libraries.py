"""Real libraries of PyPI, in the versions of the lock file. `make fidelity` installs them into
their own environment; the other targets skip these tests."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

pytestmark = pytest.mark.fidelity

PROGRAMS = [
    program(
        "numpy",
        """
        import numpy as np
        def task(config):
            a = np.arange(12.0).reshape(3, 4)
            np.save('a.npy', a)
            return [float((a @ a.T).sum()), a.mean(axis=0).tolist(), float(np.linalg.norm(a))]
    """,
        preload=("numpy",),
    ),
    program(
        "numpy-seeded",
        """
        import numpy as np
        np.random.seed(3)
        rng = np.random.default_rng(3)
        def task(config):
            return [np.random.rand(2).tolist(), rng.normal(size=2).tolist()]
    """,
        preload=("numpy",),
        jobs=2,
    ),
    program(
        "numpy-random",
        """
        import numpy as np
        RNG = np.random.default_rng()
        def task(config):
            return [np.random.rand(), RNG.random()]
    """,
        preload=("numpy",),
        jobs=3,
        is_random=True,
    ),
    program(
        "numpy-memory-map",
        """
        import numpy as np
        m = np.memmap('m.dat', dtype='float32', mode='w+', shape=(3, 4))
        def task(config):
            m[1] = 7
    """,
        preload=("numpy",),
    ),
    program(
        "numpy-errors",
        """
        import numpy as np
        def task(config):
            print(np.array([1.0]) / 0)
            return np.array([1, 2]) @ np.array([1, 2, 3])
    """,
        preload=("numpy",),
    ),
    program(
        "numpy-result",
        "import numpy as np\ndef task(config):\n    return np.float64(1.5)\n",
        preload=("numpy",),
    ),
    program(
        "numpy-threads",
        """
        import os
        os.environ['OPENBLAS_NUM_THREADS'] = '1'
        import numpy as np
        def task(config):
            a = np.ones((300, 300))
            return [float((a @ a).sum()), len(os.listdir('/proc/self/task'))]
    """,
    ),
    program(
        "numpy-in-processes",
        """
        import multiprocessing as mp
        import numpy as np
        def total(a):
            return float(a.sum())
        def task(config):
            found = []
            for method in ('fork', 'spawn', 'forkserver'):
                with mp.get_context(method).Pool(2) as pool:
                    found += pool.map(total, [np.arange(3), np.arange(4)])
            return found
    """,
        preload=("numpy",),
    ),
    program(
        "pandas",
        """
        import pandas as pd
        def task(config):
            df = pd.DataFrame({'a': [1, 2, 2], 'b': [0.5, 1.5, 2.5]})
            df.to_csv('f.csv')
            print(df.groupby('a').b.mean())
            return df.describe().loc['mean'].to_dict()
    """,
        preload=("pandas",),
    ),
    program(
        "pandas-files",
        """
        import pandas as pd
        def task(config):
            df = pd.DataFrame({'a': range(5)})
            df.to_parquet('f.parquet')
            df.to_pickle('f.pkl')
            return [len(pd.read_parquet('f.parquet')), len(pd.read_pickle('f.pkl'))]
    """,
        reader="print('read')",
    ),
    program(
        "pandas-error",
        "import pandas as pd\ndef task(config):\n    return pd.DataFrame({'a': [1]})['price']\n",
        preload=("pandas",),
    ),
    program(
        "scikit-learn",
        """
        import pickle
        from sklearn.datasets import load_iris
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_score
        def task(config):
            x, y = load_iris(return_X_y=True)
            model = LogisticRegression(max_iter=500).fit(x, y)
            with open('model.pkl', 'wb') as f:
                pickle.dump(model, f)
            return [model.score(x, y), cross_val_score(model, x, y, cv=3).tolist()]
    """,
        preload=("sklearn.linear_model", "sklearn.datasets"),
    ),
    program(
        "scikit-learn-in-parallel",
        """
        from sklearn.datasets import make_classification
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.model_selection import GridSearchCV
        def task(config):
            x, y = make_classification(200, random_state=0)
            search = GridSearchCV(RandomForestClassifier(random_state=0), {'n_estimators': [3, 5]}, n_jobs=2, cv=2)
            return search.fit(x, y).best_params_
    """,
        preload=("sklearn.ensemble",),
    ),
    program(
        "scikit-learn-warning",
        """
        from sklearn.datasets import load_iris
        from sklearn.linear_model import LogisticRegression
        def task(config):
            x, y = load_iris(return_X_y=True)
            return LogisticRegression(max_iter=2).fit(x, y).n_iter_.tolist()
    """,
        preload=("sklearn",),
    ),
    program(
        "scipy",
        """
        import numpy as np
        from scipy import optimize, sparse, stats
        def task(config):
            best = optimize.minimize(lambda x: (x[0] - 3) ** 2, [0.0], options={'disp': True})
            sparse.save_npz('s.npz', sparse.eye(3).tocsr())
            return [round(float(best.x[0]), 4), float(stats.norm.cdf(0))]
    """,
        preload=("scipy.optimize", "scipy.stats"),
        reader="print('read')",
    ),
    program(
        "matplotlib",
        """
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
        def task(config):
            plt.plot([1, 2, 3])
            plt.title('loss')
            plt.savefig('plot.png')
            return [matplotlib.get_backend().lower(), plt.get_fignums()]
    """,
        preload=("matplotlib.pyplot",),
        jobs=2,
    ),
    program(
        "matplotlib-by-the-environment",
        """
        import os
        os.environ['MPLBACKEND'] = 'svg'
        os.environ['MPLCONFIGDIR'] = os.environ['CORTEX_JOB_DIR'] + '/mpl'
        import matplotlib.pyplot as plt
        def task(config):
            plt.plot([1, 2])
            plt.savefig('plot.svg')
            return plt.get_backend()
    """,
        reader="import os\nprint(sorted(n for n in os.listdir() if not n.startswith('mpl')))",
    ),
    program(
        "matplotlib-without-a-home",
        """
        import matplotlib.pyplot as plt
        def task(config):
            plt.figure()
            return 1
    """,
        env={"HOME": "/nonexistent"},
        jobs=2,
    ),
    program(
        "lightgbm",
        """
        import lightgbm as lgb
        import numpy as np
        def task(config):
            rng = np.random.default_rng(0)
            x = rng.normal(size=(200, 4))
            y = (x[:, 0] > 0).astype(int)
            model = lgb.train({'objective': 'binary', 'num_threads': 2, 'verbose': 1, 'deterministic': True, 'force_row_wise': True}, lgb.Dataset(x, y), 5)
            model.save_model('model.txt')
            return model.predict(x[:2]).round(6).tolist()
    """,
        preload=("lightgbm",),
    ),
    program(
        "xgboost",
        """
        import numpy as np
        import xgboost as xgb
        def task(config):
            rng = np.random.default_rng(0)
            x = rng.normal(size=(200, 4))
            y = (x[:, 0] > 0).astype(int)
            data = xgb.DMatrix(x, y)
            model = xgb.train({'objective': 'binary:logistic', 'nthread': 2}, data, 5, evals=[(data, 'train')])
            model.save_model('model.json')
            return [round(float(v), 5) for v in model.predict(data)[:2]]
    """,
        preload=("xgboost",),
    ),
    program(
        "polars",
        """
        import polars as pl
        def task(config):
            df = pl.DataFrame({'a': [1, 2, 2], 'b': [0.5, 1.5, 2.5]})
            df.write_csv('f.csv')
            df.lazy().group_by('a').agg(pl.col('b').sum()).sort('a').collect().write_parquet('f.parquet')
            print(df)
            return df['b'].sum()
    """,
        preload=("polars",),
        reader="print(open('f.csv').read())",
    ),
    program(
        "pyarrow",
        """
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet as pq
        writer = pq.ParquetWriter('f.parquet', pa.schema([('a', pa.int64())]))
        sink = pa.OSFile('raw', 'wb')
        def task(config):
            writer.write_table(pa.table({'a': [1, 2, 3]}))
            sink.write(b'abc')
            pa.csv.write_csv(pa.table({'a': [1]}), 'f.csv')
    """,
        preload=("pyarrow",),
        reader="import os\nprint(sorted(os.listdir()), os.path.getsize('f.parquet') > 100, open('raw').read())",
    ),
    program(
        "opencv",
        """
        import cv2
        import numpy as np
        video = cv2.VideoWriter('v.avi', cv2.VideoWriter_fourcc(*'MJPG'), 10, (32, 32))
        def task(config):
            image = np.zeros((32, 32, 3), np.uint8)
            cv2.circle(image, (16, 16), 8, (0, 0, 255), -1)
            cv2.imwrite('i.png', image)
            for _ in range(5):
                video.write(image)
            return int(cv2.GaussianBlur(image, (5, 5), 0).sum())
    """,
        preload=("cv2",),
    ),
    program(
        "faiss",
        """
        import faiss
        import numpy as np
        def task(config):
            rng = np.random.default_rng(0)
            x = rng.random((500, 8), dtype='float32')
            kmeans = faiss.Kmeans(8, 4, niter=3, verbose=True, seed=1)
            kmeans.train(x)
            index = faiss.IndexFlatL2(8)
            index.add(x)
            faiss.write_index(index, 'index')
            return index.search(x[:2], 2)[1].tolist()
    """,
        preload=("faiss",),
    ),
    program(
        "django",
        """
        import os
        os.environ['DJANGO_SETTINGS_MODULE'] = 'settings'
        import django
        django.setup()
        from django.db import connection, models
        class Row(models.Model):
            x = models.IntegerField()
            class Meta:
                app_label = 'rows'
        def task(config):
            with connection.schema_editor() as editor:
                editor.create_model(Row)
            Row.objects.create(x=3)
            return [Row.objects.count(), django.conf.settings.SECRET_KEY]
    """,
        files={
            "settings.py": "SECRET_KEY = 'own'\nDATABASES = {'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': 'db.sqlite3'}}\nINSTALLED_APPS = []\nDEFAULT_AUTO_FIELD = 'django.db.models.AutoField'\n"
        },
        preload=("django.db",),
        reader="import sqlite3\nprint(list(sqlite3.connect('db.sqlite3').execute('SELECT * FROM rows_row')))",
    ),
    program(
        "gevent",
        """
        from gevent import monkey
        monkey.patch_all()
        import gevent, requests, threading, time
        from urllib3.util.ssl_ import create_urllib3_context
        def work(n):
            time.sleep(0.01)
            return n
        def task(config):
            jobs = [gevent.spawn(work, n) for n in range(3)]
            gevent.joinall(jobs)
            return [type(create_urllib3_context()).__module__, [j.value for j in jobs], threading.current_thread().name]
    """,
    ),
    program(
        "gevent-and-threads",
        """
        from gevent import monkey
        monkey.patch_all()
        import threading, time
        def work():
            time.sleep(0.05)
            print('thread done')
        def task(config):
            threading.Thread(target=work).start()
            print('task done')
    """,
    ),
    program(
        "requests",
        """
        import http.server, threading
        import requests
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header('Content-Length', '2')
                self.end_headers()
                self.wfile.write(b'ok')
            def log_message(self, *a):
                pass
        session = requests.Session()
        session.trust_env = False
        def task(config):
            server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return session.get(f'http://127.0.0.1:{server.server_port}/').text
    """,
        preload=("requests",),
    ),
    program(
        "requests-error",
        "import requests\ndef task(config):\n    requests.get('http://127.0.0.1:1/', timeout=1)\n",
        preload=("requests",),
    ),
    program(
        "faker",
        """
        from faker import Faker
        fake = Faker()
        def task(config):
            return [fake.name(), fake.uuid4(), fake.email()]
    """,
        jobs=3,
        is_random=True,
    ),
    program(
        "faker-seeded",
        """
        from faker import Faker
        Faker.seed(7)
        fake = Faker()
        def task(config):
            return [fake.name(), fake.uuid4()]
    """,
        jobs=2,
        preload=("faker",),
    ),
    program(
        "wandb",
        """
        import os
        os.environ['WANDB_MODE'] = 'offline'
        os.environ['WANDB_SILENT'] = 'true'
        import wandb
        def task(config):
            run = wandb.init(project='p', dir=os.environ['CORTEX_JOB_DIR'])
            for n in range(3):
                run.log({'loss': 1 / (n + 1)})
            return round(run.summary['loss'], 3)
    """,
        reader="import glob\nprint(len(glob.glob('wandb/offline-run-*/run-*.wandb')))",
    ),
    program(
        "wandb-finished",
        """
        import os
        os.environ['WANDB_SILENT'] = 'true'
        import wandb
        def task(config):
            with wandb.init(project='p', mode='offline', dir=os.environ['CORTEX_JOB_DIR']) as run:
                run.log({'loss': 1})
            return 1
    """,
        reader="import glob\nprint(len(glob.glob('wandb/offline-run-*/run-*.wandb')))",
    ),
    program(
        "huggingface-hub",
        """
        import os
        os.environ['HF_HOME'] = os.environ['CORTEX_JOB_DIR'] + '/hub'
        os.environ['HF_HUB_OFFLINE'] = '1'
        from huggingface_hub import constants, hf_hub_download
        def task(config):
            try:
                hf_hub_download('a/b', 'c')
            except Exception as error:
                return [type(error).__name__, constants.HF_HUB_OFFLINE, constants.HF_HOME == os.environ['HF_HOME']]
    """,
    ),
    program(
        "tqdm",
        """
        import time
        from tqdm import tqdm
        bar = tqdm(total=3, mininterval=0, bar_format='{l_bar}{n}/{total}', ascii=True)
        def task(config):
            for _ in range(3):
                bar.update()
            print('done')
    """,
        preload=("tqdm",),
    ),
    *[
        program(
            f"joblib-{backend}",
            f"""
            from joblib import Parallel, delayed
            def square(n):
                return n * n
            def task(config):
                return Parallel(n_jobs=2, backend={backend!r})(delayed(square)(n) for n in range(4))
        """,
            preload=("joblib",),
        )
        for backend in ("loky", "multiprocessing", "threading")
    ],
    program(
        "joblib-memory-map",
        """
        import joblib, numpy as np
        from joblib import Parallel, delayed
        def total(a):
            return [type(a).__name__, float(a.sum())]
        def task(config):
            a = np.ones(100_000)
            joblib.dump(a, 'a.joblib')
            return Parallel(n_jobs=2, max_nbytes=1000)(delayed(total)(a) for _ in range(2))
    """,
        preload=("joblib", "numpy"),
    ),
    program(
        "joblib-cache",
        """
        from joblib import Memory
        memory = Memory('cache', verbose=0)
        @memory.cache
        def slow(n):
            print('computed')
            return n + 1
        def task(config):
            return [slow(1), slow(1)]
    """,
        preload=("joblib",),
        reader="print('read')",
        jobs=2,
    ),
]


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of the environment that `make fidelity` builds."""
    interpreter = os.environ.get("CORTEX_FIDELITY_PYTHON")
    if interpreter is None:
        pytest.fail(
            "CORTEX_FIDELITY_PYTHON is not set: run `make fidelity`, which builds the libraries' environment",
            pytrace=False,
        )
    return Path(interpreter)


@pytest.mark.parametrize("program", PROGRAMS)
def test_libraries_agree_with_plain_python(program: Program, runner: Runner, python: Path) -> None:
    runner.check(replace(program, python=python, preload=()))


@pytest.mark.parametrize("program", [row for row in PROGRAMS if row.values[0].preload])
def test_preloaded_libraries_agree_with_plain_python(
    program: Program, runner: Runner, python: Path
) -> None:
    runner.check(replace(program, python=python, jobs=max(2, program.jobs)))

import pytest


@pytest.fixture(autouse=True, scope="session")
def _cuda_graphs(pytestconfig):
    from engine import harness  # imports vLLM and with it Triton, which pytest_configure must precede

    harness.CUDA_GRAPHS = pytestconfig.getoption("--cuda-graphs")

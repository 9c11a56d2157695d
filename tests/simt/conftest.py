import harness
import pytest


def pytest_collection_modifyitems(items):
    """Here, or compiled by nvcc: everything else needs the simulator."""
    reason = harness.missing()
    for item in items:
        if reason and item.path.parent == harness.HERE and item.path.stem != "test_simt_nvcc":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def plain():
    return harness.build("plain")


@pytest.fixture(scope="session")
def race():
    return harness.build("race")


def pytest_terminal_summary(terminalreporter):
    for sim in harness.built():
        terminalreporter.write_line(
            f"simulator, {sim.name} build: {sim.seconds_to_build:.1f} s to compile, "
            f"{sim.runs} runs in {sim.seconds_to_run:.1f} s"
        )
    for name, seconds in harness.other_times:
        terminalreporter.write_line(f"simulator, {name}: {seconds:.1f} s")

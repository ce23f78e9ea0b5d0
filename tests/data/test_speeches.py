import subprocess
import sys

from fewer.data import (
    CALIBRATION_IDS,
    EVALUATION_IDS,
    calibration_text,
    evaluation_text,
    speeches,
)


def test_every_address_has_its_own_id_a_year_a_president_a_party_and_a_text():
    all_ = speeches()
    assert len(all_) == len({s.id for s in all_}) == 237
    assert [s.year for s in all_] == sorted(s.year for s in all_)
    for s in all_:
        assert type(s.year) is int
        assert 1790 <= s.year <= 2026
        assert s.id.startswith(f"{s.year}-")
        assert s.president
        assert s.party
        assert len(s.text) > 1000
    assert {"Democratic", "Republican", "Whig", "Federalist"} <= {s.party for s in all_}


def test_calibration_and_evaluation_share_no_address_and_no_paragraph():
    assert not set(CALIBRATION_IDS) & set(EVALUATION_IDS)
    calibration = {p for p in calibration_text().text.split("\n") if len(p) > 40}
    evaluation = {p for p in evaluation_text().text.split("\n") if len(p) > 40}
    assert calibration
    assert evaluation
    assert not calibration & evaluation


def test_the_id_of_a_text_names_the_addresses_it_is_made_of():
    texts = {s.id: s.text for s in speeches()}
    for text, ids in ((calibration_text(), CALIBRATION_IDS), (evaluation_text(), EVALUATION_IDS)):
        assert text.id == "sotu/" + "+".join(ids)
        assert text.text == "\n\n".join(texts[i] for i in ids)


def test_changing_the_list_does_not_change_the_next_one():
    speeches().clear()
    assert len(speeches()) == 237


def test_importing_the_data_loads_no_heavy_library():
    heavy = {"sklearn", "pandas", "mnist1d", "matplotlib"}
    code = f"import sys, fewer.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

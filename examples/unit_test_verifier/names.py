"""What an answer in the pocket world must be: the tests that experiment.yaml names."""


def test_it_is_a_name(answer: str, reference: str) -> None:
    assert answer.replace(" ", "").isalpha()


def test_it_is_the_name_that_was_asked_for(answer: str, reference: str) -> None:
    assert answer.split() == reference.split()

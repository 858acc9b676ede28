"""PagedAttention's promise (Kwon et al. 2023, arXiv:2309.06180): under 4 % of the cache is reserved and unused."""

from pagoda.bench.waste import mean_waste


def test_waste_of_the_mixed_load() -> None:
    waste = mean_waste(count=300)
    assert 0 < waste < 0.04

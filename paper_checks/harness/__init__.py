"""The claim harness: data model, search, statistics, proof, runner, report."""

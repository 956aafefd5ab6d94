//! Counting test results from what nextest and rustdoc print.

use std::fmt;

use anyhow::{Context, Result};
use serde_json::Value;

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl std::ops::Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

/// Reads nextest's summary line. Its count of skipped tests includes those that a filter left out, so skipped tests
/// are taken from its list instead ([`ignored_tests`]).
pub(crate) fn from_nextest_summary(output: &str) -> Result<Totals> {
    let line =
        output.lines().rfind(|line| line.trim_start().starts_with("Summary [")).context("nextest gave no summary")?;
    let unreadable = || format!("cannot read nextest's summary: {line}");
    let counts = line.split_once(']').with_context(unreadable)?.1;
    let run = count_before(counts, " test").with_context(unreadable)?;
    let passed = count_before(counts, " passed").with_context(unreadable)?;
    Ok(Totals { passed, failed: run.saturating_sub(passed), skipped: 0 })
}

/// The names of the ignored ones among the tests that nextest lists with `--run-ignored all`: those that no filter left
/// out.
pub(crate) fn ignored_tests(list: &str) -> Result<Vec<String>> {
    let list: Value = serde_json::from_str(list).context("nextest's list is not JSON")?;
    let suites = list["rust-suites"].as_object().context("nextest's list has no suites")?;
    let mut names = Vec::new();
    for (binary, suite) in suites {
        for (name, test) in suite["testcases"].as_object().into_iter().flatten() {
            if test["ignored"] == true && test["filter-match"]["status"] == "matches" {
                names.push(format!("{binary}: {name}"));
            }
        }
    }
    Ok(names)
}

/// Adds up the results of documentation tests and names the ignored ones.
pub(crate) fn from_doc_tests(output: &str) -> (Totals, Vec<String>) {
    let results = output.lines().filter(|line| line.starts_with("test result: "));
    let totals = results.fold(Totals::default(), |totals, line| {
        let count = |what| count_before(line, what).unwrap_or(0);
        totals + Totals { passed: count(" passed"), failed: count(" failed"), skipped: count(" ignored") }
    });
    let ignored = output.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... ignored"));
    (totals, ignored.map(|name| format!("documentation of {name}")).collect())
}

/// The number that stands right before `what`.
fn count_before(text: &str, what: &str) -> Option<usize> {
    let before = &text[..text.find(what)?];
    let digits = before.bytes().rev().take_while(u8::is_ascii_digit).count();
    before[before.len() - digits..].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_of_a_good_run() {
        let totals = from_nextest_summary("     Summary [   0.020s] 1 test run: 1 passed, 2 skipped\n").unwrap();
        assert_eq!(totals, Totals { passed: 1, failed: 0, skipped: 0 });
    }

    #[test]
    fn whatever_did_not_pass_has_failed_also_what_was_never_run() {
        let output = "Summary [   9s] 11/12 tests run: 7 passed (1 slow, 1 leaky), 2 failed, 1 timed out, 1 exec failed, 5 skipped";
        assert_eq!(from_nextest_summary(output).unwrap(), Totals { passed: 7, failed: 5, skipped: 0 });
    }

    #[test]
    fn no_summary_is_an_error() {
        assert!(from_nextest_summary("error: could not compile").is_err());
        assert!(from_nextest_summary("Summary [ 1s] nothing we know").is_err());
    }

    #[test]
    fn a_filtered_test_is_not_a_skipped_one() {
        let list = r#"{"rust-suites": {"godwit-tests::moves": {"testcases": {
            "tcp": {"ignored": false, "filter-match": {"status": "matches"}},
            "quic (needs root)": {"ignored": true, "filter-match": {"status": "matches"}},
            "unix": {"ignored": true, "filter-match": {"status": "mismatch", "reason": "string"}}}}}}"#;
        assert_eq!(ignored_tests(list).unwrap(), ["godwit-tests::moves: quic (needs root)"]);
    }

    #[test]
    fn doc_tests_add_up() {
        let output = "test core/src/lib.rs - (line 3) ... ok\ntest result: ok. 3 passed; 0 failed; 0 ignored; 0 measured\n\
                      test a.rs - b (line 1) ... ignored\ntest result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured\n";
        let (totals, ignored) = from_doc_tests(output);
        assert_eq!(totals, Totals { passed: 4, failed: 2, skipped: 1 });
        assert_eq!(ignored, ["documentation of a.rs - b (line 1)"]);
    }
}

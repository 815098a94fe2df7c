//! What doctor says: a table for people, one JSON object for scripts.

use serde_json::{Value, json};

use super::environment::Finding;
use super::verdict::Verdict;

/// What came of one try.
#[derive(Debug)]
pub(super) struct Row {
    /// The program, as people are told of it.
    pub shown: String,
    /// Where somebody knows it.
    pub runtime: Option<&'static str>,
    pub version: String,
    /// Empty where it is the runtime itself.
    pub client: &'static str,
    pub client_version: String,
    pub verdict: Verdict,
    pub fix: Option<String>,
}

/// Everything that was found.
#[derive(Debug)]
pub(super) struct Report {
    pub rows: Vec<Row>,
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether all that was tried is well; where nothing could be tried nobody knows.
    pub fn is_ok(&self) -> bool {
        let tried: Vec<_> = self.rows.iter().filter(|row| row.verdict.is_tried()).collect();
        let well = tried.iter().all(|row| row.verdict.is_ok()) && !self.findings.iter().any(|found| found.problem);
        well && !tried.is_empty()
    }

    /// For people.
    pub fn table(&self) -> String {
        let names: Vec<_> = self.rows.iter().map(Row::name).collect();
        let width = names.iter().map(|name| name.chars().count()).max().unwrap_or_default();
        let word = self.rows.iter().map(|row| row.verdict.word().len()).max().unwrap_or_default();
        let mut lines = Vec::new();
        for (index, (row, name)) in self.rows.iter().zip(names).enumerate() {
            lines.push(format!("{name:width$}  {:word$}  {}", row.verdict.word(), row.verdict.detail()));
            // Said once where the next row needs the same.
            let said_below = self.rows.get(index + 1).is_some_and(|next| next.fix == row.fix);
            lines.extend(row.fix.as_ref().filter(|_| !said_below).map(|fix| format!("    fix: {fix}")));
        }
        for finding in &self.findings {
            lines.push(format!("{}: {}", if finding.problem { "problem" } else { "note" }, finding.what));
            lines.push(format!("    fix: {}", finding.fix));
        }
        lines.push(self.sum());
        lines.join("\n")
    }

    fn sum(&self) -> String {
        let tried = self.rows.iter().filter(|row| row.verdict.is_tried()).count();
        let well = self.rows.iter().filter(|row| row.verdict.is_ok()).count();
        match tried {
            0 => "nothing could be tried".to_owned(),
            tried => format!("{well} of {tried} use the proxy and trust its CA"),
        }
    }

    /// For scripts.
    pub fn json(&self) -> Value {
        json!({
            "ok": self.is_ok(),
            "runtimes": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "environment": self.findings.iter().map(Finding::json).collect::<Vec<_>>(),
        })
    }
}

impl Row {
    fn name(&self) -> String {
        let words = [self.shown.as_str(), self.version.as_str(), self.client, self.client_version.as_str()];
        words.iter().filter(|word| !word.is_empty()).copied().collect::<Vec<_>>().join(" ")
    }

    fn json(&self) -> Value {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        json!({
            "program": self.shown,
            "runtime": self.runtime,
            "version": some(&self.version),
            "client": some(self.client),
            "client_version": some(&self.client_version),
            "verdict": self.verdict.code(),
            "detail": self.verdict.detail(),
            "fix": self.fix,
        })
    }
}

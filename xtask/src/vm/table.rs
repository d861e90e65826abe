//! Renders the results as Markdown for `docs/kernels.md`.

use std::{fmt::Write, time::Duration};

use super::{
    console::{DOCTOR, Report, Section},
    machine::Cgroup,
};

/// One machine's results.
pub(crate) struct Row {
    /// The version of Debian's package.
    pub(crate) version: String,
    pub(crate) cgroup: Cgroup,
    /// The test binaries that should run.
    pub(crate) planned: Vec<&'static str>,
    /// A filter selected tests, which not every binary has.
    pub(crate) filtered: bool,
    pub(crate) report: Report,
    pub(crate) time: Duration,
}

impl Row {
    pub(crate) fn passed(&self) -> bool {
        let report = &self.report;
        // Without cgroup v2 doctor must report that one path is off and the other ready.
        let expected = if self.cgroup == Cgroup::Absent { 2 } else { 0 };
        let doctor = report.section(DOCTOR).and_then(Section::status) == Some(expected);
        let tests =
            self.planned.iter().all(|name| report.section(name).is_some_and(|section| self.has_passed(section)));
        let any = self.planned.is_empty() || report.sections.iter().any(|section| section.passed > 0);
        doctor && tests && any && report.is_complete() && report.complaints.is_empty()
    }

    fn has_passed(&self, section: &Section) -> bool {
        section.has_passed() && (section.passed > 0 || self.filtered)
    }

    fn doctor(&self) -> String {
        let Some(doctor) = self.report.section(DOCTOR) else { return "did not run".to_owned() };
        let verdict = doctor.verdict().unwrap_or("printed nothing");
        match doctor.status() {
            Some(0) => verdict.to_owned(),
            Some(status) => format!("{verdict} (exit status {status})"),
            None => "did not end".to_owned(),
        }
    }

    /// `24 of 25`, or why the binary did not finish.
    fn cell(&self, name: &str) -> String {
        let Some(section) = self.report.section(name) else { return "did not run".to_owned() };
        let ran = section.passed as usize + section.failures.len();
        let result = format!("{} of {ran}", section.passed);
        match section.status() {
            None => format!("{result}, then hung"),
            // busybox's `timeout` ended the program by a signal.
            Some(143) => format!("{result}, then exceeded its limit"),
            Some(status) if !section.has_summary() => format!("{result}, then died (exit status {status})"),
            Some(_) => result,
        }
    }

    fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        for section in self.planned.iter().filter_map(|name| self.report.section(name)) {
            for failure in &section.failures {
                findings.push(format!("`{}::{}`: {}", section.name, failure.test, failure.why));
            }
            if !section.has_summary() {
                let last = section.lines.last().map_or("nothing", String::as_str);
                findings.push(format!("`{}` did not finish; its last line: {last}", section.name));
            }
        }
        findings.extend(self.report.complaints.iter().map(|line| format!("the kernel: {line}")));
        findings
    }
}

/// In Markdown: the table, the failures on each kernel, and the output of doctor on each.
pub(crate) fn render(rows: &[Row]) -> String {
    let mut text = String::new();
    let Some(first) = rows.first() else { return text };
    let _ = write!(text, "| kernel | `penstock doctor` |");
    for name in &first.planned {
        let _ = write!(text, " `{name}` |");
    }
    let _ = writeln!(text, " time |\n|---|---|{}---|", "---|".repeat(first.planned.len()));
    for row in rows {
        let _ = write!(text, "| {} | {} |", row.version, row.doctor());
        for name in &row.planned {
            let _ = write!(text, " {} |", row.cell(name));
        }
        let _ = writeln!(text, " {:.0} s |", row.time.as_secs_f64());
    }
    for row in rows {
        let findings = row.findings();
        if !findings.is_empty() {
            let _ = writeln!(text, "\n{}:\n", row.version);
            for finding in findings {
                let _ = writeln!(text, "- {finding}");
            }
        }
    }
    for row in rows {
        let without = if row.cgroup == Cgroup::Absent { " without cgroup v2" } else { "" };
        let _ = writeln!(text, "\n`penstock doctor` on {}{without}:\n\n```text", row.version);
        for line in row.report.section(DOCTOR).map(|doctor| &doctor.lines[..]).unwrap_or_default() {
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = writeln!(text, "```");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(text: &str, cgroup: Cgroup, planned: Vec<&'static str>) -> Row {
        let mut report = Report::default();
        for line in text.lines() {
            report.line(line, Duration::ZERO);
        }
        Row { version: "6.1.176-1".to_owned(), cgroup, planned, filtered: false, report, time: Duration::from_secs(61) }
    }

    const DOCTOR_FINE: &str = "@begin doctor\nresult         every path is ready\n@end doctor 0\n";
    const FINE: &str = "@begin broken\ntest a ... ok\ntest result: ok. 1 passed\n@end broken 0\n";
    const LOG: &str = "@begin dmesg\n@end dmesg 0\n";

    #[test]
    fn passed_row_is_rendered() {
        let row = row(&[DOCTOR_FINE, FINE, LOG].concat(), Cgroup::Mounted, vec!["broken"]);
        assert!(row.passed());
        let table = "| kernel | `penstock doctor` | `broken` | time |\n|---|---|---|---|\n\
                     | 6.1.176-1 | every path is ready | 1 of 1 | 61 s |\n";
        let doctor = "\n`penstock doctor` on 6.1.176-1:\n\n```text\nresult         every path is ready\n```\n";
        assert_eq!(render(&[row]), [table, doctor].concat());
    }

    #[test]
    fn missing_part_fails_the_row() {
        let unavailable = "@begin doctor\nresult         the agent relays\n@end doctor 1\n";
        let failed = "@begin broken\ntest a ... FAILED\ntest result: FAILED. 0 passed\n@end broken 101\n";
        let complaint = "@begin dmesg\n[1] WARNING: at net/core/skmsg.c\n@end dmesg 0\n";
        for parts in [
            [DOCTOR_FINE, FINE, ""],
            [DOCTOR_FINE, "", LOG],
            [DOCTOR_FINE, failed, LOG],
            [DOCTOR_FINE, FINE, complaint],
            [unavailable, FINE, LOG],
            ["", FINE, LOG],
        ] {
            assert!(!row(&parts.concat(), Cgroup::Mounted, vec!["broken"]).passed(), "{parts:?}");
        }
        let one_path = "@begin doctor\nresult         not by: local\n@end doctor 2\n";
        assert!(row(&[one_path, LOG].concat(), Cgroup::Absent, vec![]).passed());
        assert!(!row(&[unavailable, LOG].concat(), Cgroup::Absent, vec![]).passed());
        assert!(!row(&[DOCTOR_FINE, LOG].concat(), Cgroup::Absent, vec![]).passed());
    }

    #[test]
    fn filter_must_match_in_one_binary() {
        let nothing = "@begin stalled\ntest result: ok. 0 passed\n@end stalled 0\n";
        for (parts, passed) in [([FINE, nothing], [false, true]), ([nothing, nothing], [false, false])] {
            for (filtered, passed) in [false, true].into_iter().zip(passed) {
                let text = [DOCTOR_FINE, parts[0], parts[1], LOG].concat();
                let row = Row { filtered, ..row(&text, Cgroup::Mounted, vec!["stalled"]) };
                assert_eq!(row.passed(), passed, "{parts:?}");
            }
        }
    }
}

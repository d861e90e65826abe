//! Parses a machine's console line by line: which program started, how each of its tests ended, and what the kernel complained
//! about.

use std::time::Duration;

/// Sections of `init.sh` that are not test binaries.
pub(crate) const DOCTOR: &str = "doctor";
const KERNEL_LOG: &str = "dmesg";

/// Marks of the kernel's own errors.
const COMPLAINTS: [&str; 6] = ["WARNING: ", "BUG: ", "Oops", "general protection fault", "Kernel panic", "seq # bug"];

/// Lines that are kept of each section, and of complaints.
const KEPT: usize = 60;

#[derive(Default)]
pub(crate) struct Report {
    pub(crate) sections: Vec<Section>,
    /// From the kernel's log, and from the console outside of every section.
    pub(crate) complaints: Vec<String>,
    open: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Section {
    pub(crate) name: String,
    pub(crate) begin: Duration,
    /// Duration and exit status; `None` while it runs.
    pub(crate) end: Option<(Duration, i32)>,
    /// The last lines.
    pub(crate) lines: Vec<String>,
    pub(crate) passed: u32,
    pub(crate) failures: Vec<Failure>,
    /// libtest has printed its summary.
    complete: bool,
    /// The test whose output follows.
    block: Option<usize>,
    /// The next line is the message of a panic.
    at_panic: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) test: String,
    /// The first line of the panic's message.
    pub(crate) why: String,
}

impl Report {
    /// Takes a line that came `at` after the machine's start. Returns whether a section began or ended.
    pub(crate) fn line(&mut self, line: &str, at: Duration) -> bool {
        if let Some(name) = line.strip_prefix("@begin ") {
            self.sections.push(Section { name: name.to_owned(), begin: at, ..Section::default() });
            self.open = true;
            return true;
        }
        let Some(section) = self.sections.last_mut().filter(|_| self.open) else {
            self.complain(line);
            return false;
        };
        if let Some((name, status)) = line.strip_prefix("@end ").and_then(|rest| rest.split_once(' '))
            && name == section.name
        {
            section.end = Some((at.saturating_sub(section.begin), status.parse().unwrap_or(-1)));
            self.open = false;
            return true;
        }
        if section.name == KERNEL_LOG {
            self.complain(line);
            return false;
        }
        section.line(line);
        false
    }

    fn complain(&mut self, line: &str) {
        if COMPLAINTS.iter().any(|complaint| line.contains(complaint)) && self.complaints.len() < KEPT {
            self.complaints.push(line.trim().to_owned());
        }
    }

    pub(crate) fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// Whether every section ran, including the last one, the kernel's log.
    pub(crate) fn is_complete(&self) -> bool {
        self.section(KERNEL_LOG).is_some_and(|section| section.end.is_some())
    }
}

impl Section {
    fn line(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        if self.lines.len() == KEPT {
            self.lines.remove(0);
        }
        self.lines.push(line.to_owned());

        if line.starts_with("test result: ") {
            self.complete = true;
        } else if let Some((test, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            match result.trim() {
                "ok" => self.passed += 1,
                _ => self.failures.push(Failure { test: test.to_owned(), why: "no reason given".to_owned() }),
            }
        } else if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.block = self.failures.iter().position(|failure| failure.test == test);
        } else if line.starts_with("thread '") && line.contains(" panicked at ") {
            self.at_panic = true;
        } else if self.at_panic {
            self.at_panic = false;
            if let Some(failure) = self.block.take().and_then(|at| self.failures.get_mut(at)) {
                failure.why = line.trim().to_owned();
            }
        }
    }

    /// For a test binary: it finished, and no test failed.
    pub(crate) fn has_passed(&self) -> bool {
        self.has_summary() && self.failures.is_empty() && self.status() == Some(0)
    }

    /// For a test binary: libtest printed its summary.
    pub(crate) fn has_summary(&self) -> bool {
        self.complete
    }

    pub(crate) fn status(&self) -> Option<i32> {
        self.end.map(|(_, status)| status)
    }

    /// The result in doctor's last line: `every path is ready` in `result         every path is ready`.
    pub(crate) fn verdict(&self) -> Option<&str> {
        self.lines.last()?.split_once(' ').map(|(_, verdict)| verdict.trim())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(text: &str) -> Report {
        let mut report = Report::default();
        for (line, second) in text.lines().zip(0..) {
            report.line(line, Duration::from_secs(second));
        }
        report
    }

    #[test]
    fn run_without_failures_is_good() {
        let report = report(
            "SeaBIOS\n@begin doctor\nkernel 6.1\nresult         every path is ready\n\n@end doctor 0\n@begin broken\n\
             running 2 tests\ntest a::b ... ok\ntest c ... ok\n\ntest result: ok. 2 passed; 0 failed\n\n@end broken 0\n\
             @begin dmesg\n[ 1.0] fine\n@end dmesg 0\n",
        );
        assert!(report.is_complete() && report.complaints.is_empty());
        assert_eq!(report.section("doctor").unwrap().verdict(), Some("every path is ready"));
        let broken = report.section("broken").unwrap();
        assert!(broken.has_passed());
        assert_eq!((broken.passed, broken.end), (2, Some((Duration::from_secs(7), 0))));
    }

    #[test]
    fn failures_are_reported_with_reasons() {
        let report = report(
            "@begin steering\ntest a ... FAILED\ntest b ... ok\ntest c ... FAILED\n\nfailures:\n\n---- a stdout ----\n\
             seed 7\n\nthread 'a' (3) panicked at tests/steering.rs:5:1:\nbyte 3 is wrong\nnote: more\n\n---- c stdout ----\n\
             nothing\n\nfailures:\n    a\n    c\n\ntest result: FAILED. 1 passed; 2 failed\n@end steering 101\n",
        );
        let steering = report.section("steering").unwrap();
        let failure = |test: &str, why: &str| Failure { test: test.to_owned(), why: why.to_owned() };
        assert_eq!(steering.failures, [failure("a", "byte 3 is wrong"), failure("c", "no reason given")]);
        assert!(!steering.has_passed() && steering.has_summary());
        assert!(!report.is_complete());
    }

    #[test]
    fn binary_that_dies_is_not_good() {
        assert!(!report("@begin a\ntest b ... ok\n@end a 139\n").section("a").unwrap().has_passed());
        assert!(!report("@begin a\ntest b ... ok\n").section("a").unwrap().has_passed());
    }

    #[test]
    fn kernel_complaints_are_found_in_log_and_console() {
        let report = report(
            "[ 1.0] BUG: unable to boot\n@begin a\nWARNING: a program's own\n@end a 0\n@begin dmesg\n\
             [ 9.0] WARNING: CPU: 1 PID: 9 at net/core/skmsg.c:1\n[ 9.1] ok\n@end dmesg 0\n",
        );
        assert_eq!(report.complaints.len(), 2);
    }
}

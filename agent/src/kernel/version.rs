//! Detects kernels that are known to lose or repeat bytes in sockmap silently.
//!
//! Two fixes of 2025 are required: 7683167196bd (data lost when the target's buffer is full) and 3b4f14b79428 (bytes
//! sent twice after a partial send). They are in 6.16 and in the stable releases below. The self-test cannot detect
//! their absence, because the races are rare.

use std::fs;

/// The first fixed release of each stable series.
const FIXED: [(u32, u32, u32); 4] = [(6, 1, 142), (6, 6, 94), (6, 12, 34), (6, 15, 3)];
/// From this version on every release is fixed.
const ALWAYS: (u32, u32) = (6, 16);

/// Whether a kernel of this version (`6.1.176`, optionally with a suffix) may steer.
pub fn is_sound(version: &str) -> bool {
    let (major, minor, patch) = numbers(version);
    (major, minor) >= ALWAYS || FIXED.iter().any(|&(a, b, c)| (a, b) == (major, minor) && patch >= c)
}

/// The name of the running kernel (`uname -r`), preceded by its upstream version if the name hides that: `6.1.176
/// (6.1.0-50-cloud-amd64)`.
pub fn release() -> String {
    let Ok(name) = nix::sys::utsname::uname() else { return String::new() };
    // Only Ubuntu's kernels have this file.
    let signature = fs::read_to_string("/proc/version_signature").unwrap_or_default();
    with_origin(&name.release().to_string_lossy(), &name.version().to_string_lossy(), &signature)
}

/// `version` is `uname -v`, where Debian has `Debian 6.1.176-1`; `signature` is Ubuntu's file, such as `Ubuntu
/// 6.8.0-45.45-generic 6.8.12`.
fn with_origin(release: &str, version: &str, signature: &str) -> String {
    let debian = version.split_whitespace().skip_while(|word| *word != "Debian").nth(1);
    let ubuntu = signature.strip_prefix("Ubuntu ").and_then(|rest| rest.split_whitespace().nth(1));
    let Some(origin) = ubuntu.or(debian) else { return release.to_owned() };
    let (major, minor, patch) = numbers(origin);
    let of_release = numbers(release);
    // Ignores an origin of another series.
    if (major, minor) != (of_release.0, of_release.1) || patch == of_release.2 {
        return release.to_owned();
    }
    format!("{major}.{minor}.{patch} ({release})")
}

fn numbers(version: &str) -> (u32, u32, u32) {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::{is_sound, with_origin};

    #[test]
    fn kernels_with_the_fixes_are_sound() {
        let rows = [
            ("6.18.44-fc-v595", true),
            ("7.0.1", true),
            ("6.16.0", true),
            ("6.16-rc1", true),
            ("6.15.3", true),
            ("6.15.2", false),
            ("6.13.9", false),
            ("6.12.34+deb13-amd64", true),
            ("6.12.33", false),
            ("6.6.94", true),
            ("6.6.93", false),
            ("6.1.142-1-cloud", true),
            ("6.1.176 (6.1.0-50-cloud-amd64)", true),
            ("6.1.0-37-amd64", false),
            ("5.15.0-100-generic", false),
            ("", false),
        ];
        for (release, sound) in rows {
            assert_eq!(is_sound(release), sound, "{release}");
        }
    }

    #[test]
    fn upstream_version_is_found_for_a_release_name() {
        let debian = |version: &str| format!("#1 SMP PREEMPT_DYNAMIC Debian {version} (2026-07-02)");
        let rows = [
            ("6.1.0-50-cloud-amd64", debian("6.1.176-1"), "", "6.1.176 (6.1.0-50-cloud-amd64)"),
            ("6.1.0-37-amd64", debian("6.1.140-1"), "", "6.1.140 (6.1.0-37-amd64)"),
            ("6.12.117+deb13-amd64", debian("6.12.117-1"), "", "6.12.117+deb13-amd64"),
            (
                "6.8.0-45-generic",
                "#45-Ubuntu SMP PREEMPT_DYNAMIC Fri Aug 30 12:02:04 UTC 2024".to_owned(),
                "Ubuntu 6.8.0-45.45-generic 6.8.12\n",
                "6.8.12 (6.8.0-45-generic)",
            ),
            ("6.18.44", "#1 SMP PREEMPT_DYNAMIC @0".to_owned(), "", "6.18.44"),
            // Of another kernel, truncated, or empty: only the release is shown.
            ("6.6.3-custom", debian("6.1.176-1"), "", "6.6.3-custom"),
            ("6.1.0-50-amd64", "#1 SMP Debian".to_owned(), "Ubuntu\n", "6.1.0-50-amd64"),
            ("", String::new(), "", ""),
        ];
        for (release, version, signature, expected) in rows {
            assert_eq!(with_origin(release, &version, signature), expected, "{release} {version} {signature}");
        }
        assert!(is_sound(&with_origin("6.1.0-50-amd64", &debian("6.1.176-1"), "")));
        assert!(!is_sound(&with_origin("6.1.0-37-amd64", &debian("6.1.140-1"), "")));
    }
}

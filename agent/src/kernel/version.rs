//! Kernels that are known to lose or repeat bytes in sockmap without a sign.
//!
//! Two fixes of 2025 decide: 7683167196bd (data lost when the target's buffer is full) and 3b4f14b79428 (bytes sent twice
//! after a partial send). They are in 6.16, and in the stable series from the releases below on. The self-test cannot show
//! their absence, because the races are rare.

/// The first good release of each stable series that got the fixes.
const FIXED: [(u32, u32, u32); 4] = [(6, 1, 142), (6, 6, 94), (6, 12, 34), (6, 15, 3)];
/// From here on every release has them.
const ALWAYS: (u32, u32) = (6, 16);

/// Whether the kernel of this release (`uname -r`) may steer.
pub fn is_sound(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    let (major, minor, patch) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (major, minor) >= ALWAYS || FIXED.iter().any(|&(a, b, c)| (a, b) == (major, minor) && patch >= c)
}

/// `uname -r`.
pub fn release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::is_sound;

    #[test]
    fn sound_from_the_fixes_on() {
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
            ("6.1.0-37-amd64", false),
            ("5.15.0-100-generic", false),
            ("", false),
        ];
        for (release, sound) in rows {
            assert_eq!(is_sound(release), sound, "{release}");
        }
    }
}

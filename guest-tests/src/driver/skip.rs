//! Saying that a test, or a part of one, can't run on this machine.

use std::io::Write;

/// Says why the calling test is skipped and what would help, in one line that begins with
/// `SKIPPED: `. It goes past the test runner's capture, to the terminal and to whoever counts.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("SKIPPED: {test}: {}\n", reason.trim().replace('\n', "; "));
    // Where standard error is closed there is nobody to tell.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

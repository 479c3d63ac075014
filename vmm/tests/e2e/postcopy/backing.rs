//! Post-copy to other kinds of memory.

use guest_tests::driver::hugepages::HugePages;

use super::{arrived, destination_with, furious, require_postcopy, source, switch_at_once};
use crate::harness::{scratch, skip};

#[test]
fn pages_come_late_to_any_memory_of_small_pages() {
    require_postcopy!();
    let dir = scratch();
    let mut here = source(dir.path(), "a", furious());
    for (name, memory) in [
        ("transparent", "128M,hugepages=transparent"),
        ("prealloc", "128M,hugepages=transparent,prealloc=on"),
        ("shared", "128M,shared=on"),
    ] {
        let (mut there, uri) = destination_with(dir.path(), name, &["--memory", memory]);
        switch_at_once(&mut here, &uri);
        let (info, _) = arrived(&mut here, &mut there);
        let late = info["ram"]["postcopy-bytes"].as_u64().unwrap();
        assert!(late > 32 << 20, "{info:#}");
        here.quit();
        here = there;
    }
}

#[test]
fn huge_pages_and_files_are_refused_before_a_page_moves() {
    require_postcopy!();
    let _pages = match HugePages::reserve(64) {
        Ok(pages) => pages,
        Err(error) => return skip(&format!("huge pages: {error}")),
    };
    let dir = scratch();
    let mut here = source(dir.path(), "src", furious());
    for (name, memory) in [
        ("private", "128M,hugepage-size=2M"),
        ("shared", "128M,hugepage-size=2M,shared=on"),
    ] {
        let (_there, uri) = destination_with(dir.path(), name, &["--memory", memory]);
        here.migrate(&uri);
        let info = here.wait_migrated("failed");
        let reason = info["error-desc"].as_str().unwrap();
        assert!(
            reason.contains("post-copy is not possible in the memory"),
            "{reason}"
        );
        assert!(reason.contains("--memory"), "{reason}");
        here.wait_heartbeats(20);
    }
    here.verify();
}

//! Images against QEMU's tools, against a model in memory, and against a hostile file.

mod backing;
mod copy;
mod create;
mod hostile;
mod locks;
mod model;
mod open;
mod qemu;
mod refcounts;
pub(crate) mod space;

use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{Cache, Extent, ExtentKind, Format, Image, ImageConfig, Scope};

const MIB: u64 = 1 << 20;

fn config(path: &Path, format: Option<Format>) -> ImageConfig {
    ImageConfig {
        path: path.to_owned(),
        format,
        readonly: false,
        cache: Cache::Writeback,
    }
}

/// An image of this format, opened.
fn open(path: &Path, format: Format) -> Image {
    Image::open(&config(path, Some(format))).unwrap()
}

/// The same, locked.
fn lock(path: &Path, format: Format) -> Image {
    let image = open(path, format);
    image.lock().unwrap();
    image
}

fn create(path: &Path, format: Format, capacity: u64) -> Image {
    Image::create(path, format, capacity, None, Cache::Writeback).unwrap()
}

fn write(image: &Image, offset: u64, bytes: &[u8]) {
    image.write_at(&[IoSlice::new(bytes)], offset).unwrap();
}

fn read(image: &Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image
        .read_at(&mut [IoSliceMut::new(&mut bytes)], offset)
        .unwrap();
    bytes
}

/// All extents of the disk; neighbours of a kind are one.
fn extents(image: &Image, scope: Scope) -> Vec<(ExtentKind, u64, u64)> {
    let mut found: Vec<(ExtentKind, u64, u64)> = Vec::new();
    let mut offset = 0;
    while offset < image.capacity() {
        let Extent { kind, len } = image
            .extent(offset, image.capacity() - offset, scope)
            .unwrap();
        match found.last_mut().filter(|last| last.0 == kind) {
            Some(last) => last.2 += len,
            None => found.push((kind, offset, len)),
        }
        offset += len;
    }
    found
}

/// QEMU's tools; without them the test is skipped.
struct Qemu;

impl Qemu {
    fn find() -> Option<Qemu> {
        Qemu::find_for("")
    }

    /// For a part of a test.
    fn find_for(part: &str) -> Option<Qemu> {
        let tools = ["qemu-img", "qemu-io"];
        let missing = |tool: &&str| Command::new(tool).arg("--version").output().is_err();
        let Some(tool) = tools.into_iter().find(missing) else {
            return Some(Qemu);
        };
        let reason = format!("{part}no {tool}; install the package qemu-utils");
        guest_tests::driver::skip(&reason);
        None
    }

    fn run(&self, tool: &str, args: &[&str]) -> Output {
        Command::new(tool).args(args).output().unwrap()
    }

    /// Runs `qemu-img` and returns what it says.
    fn img(&self, args: &[&str]) -> String {
        let output = self.run("qemu-img", args);
        assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs commands of `qemu-io`.
    fn io(&self, path: &Path, format: Format, commands: &[&str]) {
        let format = format.to_string();
        let mut args = vec!["-f", format.as_str()];
        commands
            .iter()
            .for_each(|command| args.extend(["-c", command]));
        args.push(text(path));
        let output = self.run("qemu-io", &args);
        let said = String::from_utf8_lossy(&output.stdout);
        let ok = output.status.success() && !said.contains("failed");
        assert!(ok, "qemu-io {args:?}: {output:?}");
    }

    /// The image is without errors and leaks.
    fn check(&self, path: &Path) {
        self.img(&["check", "-f", "qcow2", text(path)]);
    }
}

/// Lets QEMU check a qcow2 image, where there is one.
fn check(path: &Path, format: Format) {
    if format == Format::Qcow2
        && let Some(qemu) = Qemu::find_for("in part: check of the image: ")
    {
        qemu.check(path);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    (dir, path)
}

/// Random numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

//! Copies of images' files.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use super::{MIB, create, lock, open, read, write};
use crate::image::{Error, Format, copy_file, fingerprint_file};

#[test]
fn a_copy_is_the_image_as_if_it_were_closed() {
    let dir = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = dir.path().join(format!("{format}"));
        let to = dir.path().join(format!("{format}.copy"));
        let image = create(&path, format, 64 * MIB);
        write(&image, 40 * MIB, &[7; 100_000]);
        write(&image, MIB, &[8; 512]);
        image.copy_file(&to, &|| true).unwrap();
        // Neither is in the copy.
        write(&image, MIB, &[9; 512]);
        write(&image, 2 * MIB, &[9; 512]);

        // An image that is marked as being written could not be locked.
        let copy = lock(&to, format);
        assert_eq!(read(&copy, 40 * MIB, 100_000), [7; 100_000]);
        assert_eq!(read(&copy, MIB, 512), [8; 512]);
        assert_eq!(read(&copy, 2 * MIB, 512), [0; 512]);
        assert!(copy.allocated().unwrap() < 2 * MIB, "no holes");
        // The image is still ours.
        assert!(image.locked() && open(&path, format).lock().is_err());
    }
}

#[test]
fn a_copy_that_is_not_made_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (path, to) = (dir.path().join("image"), dir.path().join("copy"));
    let image = create(&path, Format::Raw, 8 * MIB);
    write(&image, 0, &[7; 512]);
    // Where data is shared there is nothing to be cancelled.
    if let Err(error) = image.copy_file(&to, &|| false) {
        assert!(error.to_string().contains("cancelled"), "{error}");
        assert!(!to.exists());
    }
    std::fs::write(&to, "precious").unwrap();
    assert!(image.copy_file(&to, &|| true).is_err());
    assert_eq!(std::fs::read(&to).unwrap(), b"precious");
    std::fs::remove_file(&to).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, [1; 512]).unwrap();
    let error = image.copy_file(&to, &|| true).unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    assert!(!to.exists());
}

#[test]
fn a_copy_has_the_permissions_and_the_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    let (path, to) = (dir.path().join("image"), dir.path().join("copy"));
    std::fs::write(&path, [1; 5000]).unwrap();
    let file = File::open(&path).unwrap();
    let mode = |path| std::fs::metadata(path).unwrap().mode() & 0o777;
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    file.set_permissions(permissions).unwrap();
    copy_file(&file, &path, &to, &|| true).unwrap();
    assert_eq!(mode(&to), 0o640);
    let of = |path| fingerprint_file(path).unwrap();
    assert_eq!(of(&to), of(&path));
    let mut bytes = std::fs::read(&to).unwrap();
    bytes[4999] = 2;
    std::fs::write(&to, bytes).unwrap();
    assert_ne!(of(&to), of(&path));
}

//! A small file system that can become full.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

/// A file system in memory, of a limited size; unmounted when it is dropped.
pub(crate) struct Mount {
    folder: TempDir,
}

impl Mount {
    /// Mounts it, as root or by `sudo` that asks for nothing; or says why that cannot be done.
    pub(crate) fn new(bytes: u64) -> Result<Self, String> {
        let folder = tempfile::Builder::new()
            .prefix("nexus-faults-mount.")
            .tempdir_in("/var/tmp")
            .map_err(|error| error.to_string())?;
        let options = format!("size={bytes},mode=0777");
        let path = folder.path().to_owned();
        let mut command = as_root("mount");
        command
            .args(["-t", "tmpfs", "-o", &options, "nexus-faults"])
            .arg(&path);
        let output = command.output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self { folder })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path: PathBuf = self.folder.path().to_owned();
        // Lazily, should something still look into it.
        let _ = as_root("umount").arg("-l").arg(path).status();
    }
}

fn as_root(program: &str) -> Command {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(program)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", program]);
        sudo
    };
    command.stdin(Stdio::null());
    command
}

/* Stands between a process and the C library: counts the calls that change files under given folders, and at one of
 * them sends a signal or fails with an error. Loaded by LD_PRELOAD; armed by fault_arm in the process itself.
 *
 * What the C library calls inside itself (fopen's own write) is not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CHANGES = 1, REMOVES = 2, OPENS = 4, READS = 8, CREATES = 16 };

static char prefixes[8][PATH_MAX];
static int n_prefixes, kinds, value, is_signal, is_sticky, log_file = -1;
static long target, count;

/* Count calls of `mask` under `folders` (colon between them); at number `nth` (0: never) send signal or fail with it.
 * Sticky: every later call of the same kinds fails too. `log_path` gets a line a call; NULL for none. */
void fault_arm(const char *folders, int mask, long nth, int number, int signal_not_error, int sticky, const char *log_path) {
    char all[8 * PATH_MAX];
    n_prefixes = 0;
    snprintf(all, sizeof all, "%s", folders);
    for (char *rest = all, *one; n_prefixes < 8 && (one = strsep(&rest, ":"));)
        snprintf(prefixes[n_prefixes++], PATH_MAX, "%s", one);
    kinds = mask, value = number, is_signal = signal_not_error, is_sticky = sticky, count = 0, target = nth;
    log_file = log_path ? (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
}

long fault_count(void) { return count; }

static int inside(const char *path) {
    for (int i = 0; i < n_prefixes; i++)
        if (!strncmp(path, prefixes[i], strlen(prefixes[i]))) return 1;
    return 0;
}

/* The absolute path of `path` seen from `folder`, or of the descriptor itself where `path` is NULL. */
static void resolve(int folder, const char *path, char *out) {
    char link[64];
    if (path && path[0] == '/') { snprintf(out, PATH_MAX, "%s", path); return; }
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
    if (path && n > 0) snprintf(out + n, PATH_MAX - n, "/%s", path);
}

/* Whether this call is to fail; errno is then set. */
static int struck(const char *name, int kind, int folder, const char *path) {
    char full[PATH_MAX], line[PATH_MAX + 64];
    int saved = errno;
    if (!(kinds & kind)) return 0;
    resolve(folder, path, full);
    if (!inside(full)) { errno = saved; return 0; }
    long now = __sync_add_and_fetch(&count, 1);
    if (log_file >= 0) {
        int n = snprintf(line, sizeof line, "%s %s\n", name, full);
        syscall(SYS_write, log_file, line, n);
    }
    errno = saved;
    if (target == 0 || now < target || (now > target && !is_sticky)) return 0;
    if (is_signal) { if (now == target) kill(getpid(), value); return 0; }
    errno = value;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)

static int flags_kind(int flags) {
    return (flags & (O_CREAT | O_TRUNC)) ? CREATES : OPENS;
}
#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(name);                                                                  \
        return struck(#name, flags_kind(flags), AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
OPEN(open) OPEN(open64)
#define OPENAT(name)                                                                 \
    int name(int folder, const char *path, int flags, ...) {                         \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(name);                                                                  \
        return struck(#name, flags_kind(flags), folder, path) ? -1 : real(folder, path, flags, mode); \
    }
OPENAT(openat) OPENAT(openat64)
#define FOPEN(name)                                                                  \
    FILE *name(const char *path, const char *mode) {                                 \
        REAL(name);                                                                  \
        return struck(#name, strpbrk(mode, "wa") ? CREATES : OPENS, AT_FDCWD, path) ? NULL : real(path, mode); \
    }
FOPEN(fopen) FOPEN(fopen64)

#define ON_FILE(type, name, kind, parameters, ...)                                   \
    type name parameters { REAL(name); return struck(#name, kind, fd, NULL) ? -1 : real(__VA_ARGS__); }
ON_FILE(ssize_t, write, CHANGES, (int fd, const void *data, size_t n), fd, data, n)
ON_FILE(ssize_t, writev, CHANGES, (int fd, const struct iovec *data, int n), fd, data, n)
ON_FILE(ssize_t, pwrite, CHANGES, (int fd, const void *data, size_t n, off_t at), fd, data, n, at)
ON_FILE(ssize_t, pwrite64, CHANGES, (int fd, const void *data, size_t n, off64_t at), fd, data, n, at)
ON_FILE(ssize_t, sendfile, CHANGES, (int fd, int from, off_t *at, size_t n), fd, from, at, n)
ON_FILE(ssize_t, sendfile64, CHANGES, (int fd, int from, off64_t *at, size_t n), fd, from, at, n)
ON_FILE(int, ftruncate, CHANGES, (int fd, off_t n), fd, n)
ON_FILE(int, ftruncate64, CHANGES, (int fd, off64_t n), fd, n)
ON_FILE(int, fsync, CHANGES, (int fd), fd)
ON_FILE(int, fdatasync, CHANGES, (int fd), fd)
ON_FILE(ssize_t, read, READS, (int fd, void *data, size_t n), fd, data, n)
ON_FILE(ssize_t, pread, READS, (int fd, void *data, size_t n, off_t at), fd, data, n, at)
ON_FILE(ssize_t, pread64, READS, (int fd, void *data, size_t n, off64_t at), fd, data, n, at)

ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t n, unsigned flags) {
    REAL(copy_file_range);
    return struck("copy_file_range", CHANGES, fd, NULL) ? -1 : real(from, from_at, fd, at, n, flags);
}

#define ON_PATH(name, kind, folder, path, parameters, ...)                           \
    int name parameters { REAL(name); return struck(#name, kind, folder, path) ? -1 : real(__VA_ARGS__); }
ON_PATH(unlink, REMOVES, AT_FDCWD, path, (const char *path), path)
ON_PATH(unlinkat, REMOVES, folder, path, (int folder, const char *path, int flags), folder, path, flags)
ON_PATH(rmdir, REMOVES, AT_FDCWD, path, (const char *path), path)
ON_PATH(mkdir, CHANGES, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, CHANGES, folder, path, (int folder, const char *path, mode_t mode), folder, path, mode)
ON_PATH(rename, CHANGES, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(renameat, CHANGES, to_folder, to, (int folder, const char *from, int to_folder, const char *to), folder, from, to_folder, to)
ON_PATH(renameat2, CHANGES, to_folder, to, (int folder, const char *from, int to_folder, const char *to, unsigned flags), folder, from, to_folder, to, flags)
ON_PATH(link, CHANGES, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(linkat, CHANGES, to_folder, to, (int folder, const char *from, int to_folder, const char *to, int flags), folder, from, to_folder, to, flags)
ON_PATH(symlink, CHANGES, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(symlinkat, CHANGES, folder, to, (const char *from, int folder, const char *to), from, folder, to)
ON_PATH(truncate, CHANGES, AT_FDCWD, path, (const char *path, off_t n), path, n)

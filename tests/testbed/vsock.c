/* SPDX-License-Identifier: Apache-2.0 */
/* AF_VSOCK for a guest without a language of its own: `vsock connect PORT` sends its standard input to the host and prints
 * what comes back; `vsock listen PORT` prints what one connection brings. Either ends when the other side has. */

#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int failed(const char *what)
{
    perror(what);
    exit(1);
}

static void copy(int from, int to)
{
    static char piece[1 << 16];
    for (ssize_t got, put; (got = read(from, piece, sizeof piece)) != 0;) {
        if (got < 0)
            failed("read");
        for (ssize_t at = 0; at < got; at += put)
            if ((put = write(to, piece + at, got - at)) < 0)
                failed("write");
    }
}

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_port = atoi(words[2]) };
    int is_listener = !strcmp(words[1], "listen"), fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    address.svm_cid = is_listener ? VMADDR_CID_ANY : VMADDR_CID_HOST;
    if (is_listener) {
        if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1))
            failed("listen");
        fprintf(stderr, "listening on port %s\n", words[2]);
        fd = accept(fd, NULL, NULL);
    } else {
        if (connect(fd, (struct sockaddr *)&address, sizeof address))
            failed("connect");
        copy(0, fd);
        shutdown(fd, SHUT_WR);
    }
    copy(fd, 1);
    return 0;
}
